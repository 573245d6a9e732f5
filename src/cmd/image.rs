//! `sheave image`: the node's image store, worked on directly under its lock, whether or not an agent is running.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use sheave_agent::runtime::image::{ImageInfo, ImageStore, Progress};

use super::table::Table;
use crate::cli::{BaseFlags, Output};

pub(super) fn import(base: &BaseFlags, path: &Path, name: Option<&str>) -> Result<()> {
    let store = ImageStore::open(&state_dir(base)?)?;
    let bar = ProgressBar::no_length();
    bar.set_style(ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes}")?);
    let images = store.import(path, name, &mut |progress: Progress| {
        bar.set_message(format!("{} layer {}/{}", progress.image, progress.layer, progress.layers));
        bar.set_length(progress.total_bytes);
        bar.set_position(progress.done_bytes);
    })?;
    bar.finish_and_clear();
    let mut out = std::io::stdout();
    for image in &images {
        writeln!(out, "{} {}", image.names.join(","), image.id)?;
    }
    Ok(())
}

pub(super) fn list(base: &BaseFlags, output: Output) -> Result<()> {
    let images = ImageStore::open(&state_dir(base)?)?.list()?;
    let mut out = std::io::stdout();
    match output {
        Output::Json => writeln!(out, "{}", json!(images.iter().map(as_json).collect::<Vec<_>>()))?,
        Output::Table => {
            let mut table = Table::new(&["NAME", "ID", "LAYERS", "SIZE", "CREATED"]);
            for image in &images {
                let names =
                    if image.names.is_empty() { vec!["<none>".to_owned()] } else { image.names.clone() };
                for name in names {
                    table.row([
                        name,
                        image.id.chars().take(19).collect(),
                        image.layers.to_string(),
                        size(image.size_bytes),
                        image.created.clone(),
                    ]);
                }
            }
            table.print(&mut out)?;
        }
    }
    Ok(())
}

pub(super) fn remove(base: &BaseFlags, name: &str) -> Result<()> {
    // The store itself keeps layers that are part of a mounted root file system.
    ImageStore::open(&state_dir(base)?)?.remove(name, &|_: &Path| false)?;
    writeln!(std::io::stdout(), "removed {name}")?;
    Ok(())
}

fn state_dir(base: &BaseFlags) -> Result<PathBuf> {
    Ok(super::paths(base)?.state_dir)
}

fn as_json(image: &ImageInfo) -> serde_json::Value {
    json!({
        "id": image.id, "names": image.names, "manifestDigest": image.manifest_digest,
        "layers": image.layers, "sizeBytes": image.size_bytes, "created": image.created,
    })
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(17), "17 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(3 << 20), "3.0 MiB");
    }
}
