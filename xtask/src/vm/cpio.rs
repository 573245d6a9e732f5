//! Archives for the kernel's first root filesystem ("newc" cpio, see the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst). Written here because it is one page and because the
//! archives must not depend on who made them: every entry belongs to root and has no time.

use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result};

const DIRECTORY: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_600;

pub(crate) struct Archive<W: Write> {
    out: W,
    inode: u32,
    written: usize,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Archive { out, inode: 0, written: 0 }
    }

    pub(crate) fn directory(&mut self, name: &str) -> io::Result<()> {
        self.entry(name, DIRECTORY, (0, 0), &[])
    }

    pub(crate) fn link(&mut self, name: &str, to: &str) -> io::Result<()> {
        self.entry(name, LINK, (0, 0), to.as_bytes())
    }

    pub(crate) fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entry(name, FILE | mode, (0, 0), content)
    }

    pub(crate) fn device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(name, CHARACTER_DEVICE, (major, minor), &[])
    }

    /// Adds everything below `dir` as `prefix/…`, in sorted order. `prefix` itself must have been added.
    pub(crate) fn tree(&mut self, dir: &Path, prefix: &str) -> Result<()> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
            paths.push(entry.with_context(|| format!("list {}", dir.display()))?.path());
        }
        paths.sort();
        for path in paths {
            let base = path.file_name().context("entries have names")?.to_string_lossy();
            let name = format!("{prefix}/{base}");
            if path.is_dir() {
                self.directory(&name)?;
                self.tree(&path, &name)?;
            } else {
                let content = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
                let mode = path
                    .metadata()
                    .with_context(|| format!("look at {}", path.display()))?
                    .permissions()
                    .mode();
                self.file(&name, mode & 0o777, &content)?;
            }
        }
        Ok(())
    }

    /// Ends the archive and gives the output back.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.out)
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let size =
            u32::try_from(content.len()).map_err(|_| io::Error::other(format!("{name}: over 4 GB")))?;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        let name_size = name.len() as u32 + 1;
        // inode mode uid gid links mtime size devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        let mut head = String::from("070701");
        for field in fields {
            head.push_str(&format!("{field:08x}"));
        }
        self.put(head.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(content)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    /// Names and contents end on a border of four bytes.
    fn pad(&mut self) -> io::Result<()> {
        let missing = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 4][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_and_ended() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("bin").expect("write to memory");
        archive.file("bin/a", 0o755, b"12345").expect("write to memory");
        archive.link("b", "bin/a").expect("write to memory");
        let bytes = archive.finish().expect("write to memory");
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(text.matches("070701").count(), 4);
        assert!(text.contains("000081ed") && text.contains("bin/a\0") && text.contains("TRAILER!!!"));
    }
}
