//! Another plugin that does a part of the work (address management). Invariant: it gets the same environment and the
//! whole configuration, its standard error is ours, and it is waited for no longer than the call may take.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use crate::call::Command;
use crate::error::{Error, code};

/// Tries of starting a program that is being replaced.
const BUSY_TRIES_MAX: u32 = 20;
/// Pause between them.
const BUSY_PAUSE_MS: u64 = 50;

/// Finds the program of that name in the directories of `CNI_PATH`.
fn find(name: &str, path: &[PathBuf]) -> Result<PathBuf, Error> {
    if name.contains('/') || name == "." || name == ".." {
        return Err(Error::new(code::BAD_CONFIG, format!("ipam.type {name:?} is not the name of a plugin")));
    }
    if path.is_empty() {
        let message =
            format!("required environment variables are missing: CNI_PATH (ipam.type {name:?} is in it)");
        return Err(Error::new(code::BAD_ENVIRONMENT, message));
    }
    path.iter().map(|dir| dir.join(name)).find(|file| file.is_file()).ok_or_else(|| {
        let dirs: Vec<_> = path.iter().map(|dir| dir.display().to_string()).collect();
        let message = format!("ipam.type {name:?} is in no directory of CNI_PATH {}", dirs.join(":"));
        Error::new(code::BAD_CONFIG, message)
    })
}

/// Runs the delegate `name` and returns what it printed.
pub(crate) fn run(
    name: &str,
    path: &[PathBuf],
    command: Command,
    config: &[u8],
    deadline: Instant,
) -> Result<Option<Value>, Error> {
    let program = find(name, path)?;
    let failed = |what: &str, error: &io::Error| {
        Error::new(code::IO, format!("{what} {}: {error}", program.display()))
    };
    let mut child = start(&program, command).map_err(|error| failed("start", &error))?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read what it is given has its reasons.
        match stdin.write_all(config) {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(failed("write to", &error));
            }
            _ => {}
        }
    }
    let printed = read_until(&mut child, deadline);
    let printed = match printed {
        Ok(printed) => printed,
        Err(error) => {
            // It is gone already, or it is killed now; in neither case is it left behind.
            child.kill().unwrap_or_default();
            child.wait().map_err(|error| failed("wait for", &error))?;
            return Err(Error::new(
                code::TRY_LATER,
                format!("{} did not answer: {error}", program.display()),
            ));
        }
    };
    let status = child.wait().map_err(|error| failed("wait for", &error))?;
    let value: Option<Value> = serde_json::from_slice(&printed).ok();
    if status.success() {
        return Ok(value);
    }
    let said = value.as_ref().and_then(Error::from_value);
    Err(said.unwrap_or_else(|| {
        let text = String::from_utf8_lossy(&printed).trim().to_owned();
        Error::new(code::KERNEL, format!("{} failed: {status}", program.display())).with(text)
    }))
}

fn start(program: &Path, command: Command) -> io::Result<Child> {
    let mut tries = 0;
    loop {
        let mut process = Process::new(program);
        process.env("CNI_COMMAND", command.name()).stdin(Stdio::piped()).stdout(Stdio::piped());
        match process.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY_TRIES_MAX => {
                tries += 1;
                thread::sleep(Duration::from_millis(BUSY_PAUSE_MS));
            }
            done => return done,
        }
    }
}

/// Everything that it prints until it closes its output.
fn read_until(child: &mut Child, deadline: Instant) -> io::Result<Vec<u8>> {
    let Some(mut out) = child.stdout.take() else { return Ok(Vec::new()) };
    let (mut printed, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(out.as_fd(), PollFlags::POLLIN)], timeout) {
            Err(nix::Error::EINTR) => continue,
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            done => done?,
        };
        match out.read(&mut piece)? {
            0 => return Ok(printed),
            count => printed.extend_from_slice(&piece[..count]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn script(dir: &Path, name: &str, text: &str) {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[test]
    fn delegates_get_the_configuration_and_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = [PathBuf::from("/nonexistent"), dir.path().to_owned()];
        script(dir.path(), "echo", "cat");
        let value = run("echo", &path, Command::Add, br#"{"a": 1}"#, soon()).unwrap().unwrap();
        assert_eq!(value["a"], 1);
        script(dir.path(), "verb", r#"echo "{\"code\": 11, \"msg\": \"$CNI_COMMAND\"}"; exit 1"#);
        let error = run("verb", &path, Command::Del, b"{}", soon()).unwrap_err();
        assert_eq!((error.code, error.message.as_str()), (11, "DEL"));
        script(dir.path(), "odd", "echo oh no; exit 3");
        let error = run("odd", &path, Command::Add, b"{}", soon()).unwrap_err();
        assert!(error.message.contains("odd failed") && error.details == "oh no", "{error}");
        script(dir.path(), "quiet", "exit 0");
        assert_eq!(run("quiet", &path, Command::Check, b"{}", soon()), Ok(None));
    }

    #[test]
    fn delegates_are_found_and_not_waited_for_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = [dir.path().to_owned()];
        assert_eq!(run("none", &path, Command::Add, b"{}", soon()).unwrap_err().code, code::BAD_CONFIG);
        assert_eq!(run("../x", &path, Command::Add, b"{}", soon()).unwrap_err().code, code::BAD_CONFIG);
        let error = run("x", &[], Command::Add, b"{}", soon()).unwrap_err();
        assert!(error.code == code::BAD_ENVIRONMENT && error.message.contains("CNI_PATH"));
        script(dir.path(), "slow", "exec sleep 600");
        let error = run("slow", &path, Command::Add, b"{}", Instant::now() + Duration::from_millis(30));
        assert_eq!(error.unwrap_err().code, code::TRY_LATER);
    }
}
