//! What the person in front sees: a moving line on a terminal, one plain line a step in a pipe, and the whole output
//! of a program only when it failed.

use std::io::{IsTerminal, Write};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::proc;

/// Prints an error with its causes.
pub(crate) fn error(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
}

/// True when somebody is there to be asked.
pub(crate) fn interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Asks a yes/no question; an empty answer is yes.
pub(crate) fn confirm(question: &str) -> Result<bool> {
    eprint!("{question} [Y/n] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim().to_ascii_lowercase().as_str(), "" | "y" | "yes"))
}

/// A step that is under way. Its line is settled by [`Step::done`] or, when dropped, marked as failed.
pub(crate) struct Step {
    title: String,
    start: Instant,
    bar: Option<ProgressBar>,
    settled: bool,
}

impl Step {
    pub(crate) fn start(title: impl Into<String>) -> Step {
        let title = title.into();
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})")
                .unwrap_or_else(|_| ProgressStyle::default_spinner());
            let bar = ProgressBar::new_spinner().with_style(style).with_message(title.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Step { title, start: Instant::now(), bar, settled: false }
    }

    /// Settles the line, adding what came of the step.
    pub(crate) fn done(mut self, outcome: &str) {
        self.settle("✓", outcome);
    }

    fn settle(&mut self, mark: &str, outcome: &str) {
        self.settled = true;
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        let colon = if outcome.is_empty() { "" } else { ": " };
        eprintln!("{mark} {}{colon}{outcome} ({:.1} s)", self.title, self.start.elapsed().as_secs_f64());
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.settled {
            self.settle("✗", "failed");
        }
    }
}

/// Runs one program as a step, keeping its output unless it fails.
pub(crate) fn step(title: &str, command: &mut Command) -> Result<()> {
    let step = Step::start(title);
    let output = proc::capture(command)?;
    if !output.status.success() {
        drop(step);
        std::io::stderr().write_all(&output.stdout)?;
        std::io::stderr().write_all(&output.stderr)?;
        bail!("{}: {}", proc::line(command), output.status);
    }
    step.done("");
    Ok(())
}
