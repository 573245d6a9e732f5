//! Who a container runs as. Invariant: a user or group named by an image or a pod is looked up in the image's own
//! tables, as a process inside would see them, and a name that is not there is an error, never root.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::error::ImageError;
use super::{Image, tree, xattr};
use crate::limits;

/// Numbers of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserIds {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Groups that list the user; empty where the specification names a group.
    pub groups: Vec<u32>,
    /// The user's home directory; `/` where the image has none.
    pub home: PathBuf,
}

/// Resolves `user[:group]` (names or numbers, empty for root) with the passwd and group tables of `image`.
pub fn resolve_user(image: &Image, spec: &str) -> Result<UserIds, ImageError> {
    let passwd = table(image, "etc/passwd")?;
    let group = table(image, "etc/group")?;
    ids(spec, &passwd, &group).map_err(|problem| ImageError::Document {
        image: image.names.first().unwrap_or(&image.id).clone(),
        problem,
    })
}

fn ids(spec: &str, passwd: &str, group: &str) -> Result<UserIds, String> {
    let (user, named_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|g| !g.is_empty())),
        None => (spec, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number: Option<u32> = user.parse().ok();
    let entry = rows(passwd, 6).find(|row| match number {
        Some(uid) => row[2].parse() == Ok(uid),
        None => row[0] == user,
    });
    let uid = number
        .or_else(|| entry.as_ref().and_then(|row| row[2].parse().ok()))
        .ok_or_else(|| format!("user {user:?} is not in its /etc/passwd; give a number"))?;
    let home = entry.as_ref().map(|row| row[5]).filter(|home| home.starts_with('/')).unwrap_or("/");
    let home = PathBuf::from(home);
    if let Some(name) = named_group {
        let gid = name
            .parse()
            .ok()
            .or_else(|| rows(group, 3).find(|row| row[0] == name).and_then(|row| row[2].parse().ok()))
            .ok_or_else(|| format!("group {name:?} is not in its /etc/group; give a number"))?;
        return Ok(UserIds { uid, gid, groups: Vec::new(), home });
    }
    let gid = entry.as_ref().and_then(|row| row[3].parse().ok()).unwrap_or(0);
    let login = entry.as_ref().map(|row| row[0]);
    let member = |row: &Vec<&str>| login.is_some_and(|login| row[3].split(',').any(|one| one == login));
    let groups = rows(group, 4).filter(member).filter_map(|row| row[2].parse().ok()).collect();
    Ok(UserIds { uid, gid, groups, home })
}

/// The lines of a table that have at least `columns`.
fn rows(table: &str, columns: usize) -> impl Iterator<Item = Vec<&str>> {
    table.lines().map(|line| line.split(':').collect::<Vec<&str>>()).filter(move |row| row.len() >= columns)
}

/// Reads a file as the merged layers show it; empty where there is none. Links are followed inside their layer only.
fn table(image: &Image, path: &str) -> Result<String, ImageError> {
    for layer in image.layers.iter().rev() {
        let io = |source| ImageError::Io { op: "read", path: layer.join(path), source };
        match look(layer, path).map_err(io)? {
            Look::Found(text) => return Ok(text),
            Look::Removed => break,
            Look::Below => {}
        }
    }
    Ok(String::new())
}

enum Look {
    Found(String),
    /// This layer hides what lower ones have.
    Removed,
    /// This layer says nothing.
    Below,
}

fn look(layer: &Path, path: &str) -> io::Result<Look> {
    let root = tree::open_store_dir(layer)?;
    match tree::walk(&root, path.as_bytes(), OFlag::O_RDONLY | OFlag::O_NONBLOCK) {
        Ok(fd) => {
            let file = File::from(fd);
            if !file.metadata()?.is_file() {
                return Ok(Look::Removed);
            }
            let mut bytes = Vec::new();
            file.take(limits::IMAGE_DOCUMENT_BYTES_MAX).read_to_end(&mut bytes)?;
            Ok(Look::Found(String::from_utf8_lossy(&bytes).into_owned()))
        }
        // Opening a whiteout: no driver has device 0:0.
        Err(Errno::ENXIO | Errno::ENODEV | Errno::ENOTDIR | Errno::ELOOP) => Ok(Look::Removed),
        Err(Errno::ENOENT) => {
            let dir = path.rsplit_once('/').map_or(".", |(dir, _)| dir);
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            match tree::walk(&root, dir.as_bytes(), flags) {
                Ok(dir) if xattr::has(&dir, tree::OPAQUE_XATTR, b"y")? => Ok(Look::Removed),
                Ok(_) | Err(Errno::ENOENT) => Ok(Look::Below),
                Err(_) => Ok(Look::Removed),
            }
        }
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:101:102::/srv:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nwww:x:102:\nlogs:x:200:web,other\nmore:x:201:web\n";

    fn of(spec: &str) -> Result<(u32, u32, Vec<u32>, String), String> {
        ids(spec, PASSWD, GROUP).map(|u| (u.uid, u.gid, u.groups, u.home.display().to_string()))
    }

    #[test]
    fn users_are_looked_up() {
        assert_eq!(of(""), Ok((0, 0, vec![], "/root".to_owned())));
        assert_eq!(of("web"), Ok((101, 102, vec![200, 201], "/srv".to_owned())));
        assert_eq!(of("101"), Ok((101, 102, vec![200, 201], "/srv".to_owned())));
        assert_eq!(of("web:logs"), Ok((101, 200, vec![], "/srv".to_owned())));
        assert_eq!(of("65532:65532"), Ok((65532, 65532, vec![], "/".to_owned())));
        assert_eq!(of("65532"), Ok((65532, 0, vec![], "/".to_owned())));
        assert_eq!(of(":www"), Ok((0, 102, vec![], "/root".to_owned())));
    }

    #[test]
    fn unknown_names_are_errors() {
        assert!(of("nobody").unwrap_err().contains("/etc/passwd"));
        assert!(of("web:nogroup").unwrap_err().contains("/etc/group"));
        assert!(of("-1").is_err() && of("4294967296").is_err());
    }
}
