//! Paths to fields, as errors name them: built without allocating, written only when something is wrong.

use std::fmt;

/// A path such as `spec.containers[0].name`.
#[derive(Debug, Clone, Copy)]
pub enum Path<'a> {
    /// The object itself.
    Root,
    /// A member.
    Key(&'a Path<'a>, &'a str),
    /// An item of a list.
    Index(&'a Path<'a>, usize),
}

impl<'a> Path<'a> {
    /// A member of what this path names.
    pub fn key(&'a self, key: &'a str) -> Path<'a> {
        Path::Key(self, key)
    }

    /// An item of the list that this path names.
    pub fn at(&'a self, index: usize) -> Path<'a> {
        Path::Index(self, index)
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Root => Ok(()),
            // Keys of maps may hold dots themselves.
            Path::Key(parent, key) if key.contains(['.', '/']) => write!(f, "{parent}[{key}]"),
            Path::Key(Path::Root, key) => f.write_str(key),
            Path::Key(parent, key) => write!(f, "{parent}.{key}"),
            Path::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_as_kubernetes_does() {
        let root = Path::Root;
        let spec = root.key("spec");
        let containers = spec.key("containers");
        let first = containers.at(0);
        assert_eq!(first.key("name").to_string(), "spec.containers[0].name");
        let labels = spec.key("labels");
        assert_eq!(labels.key("a.b/c").to_string(), "spec.labels[a.b/c]");
        assert_eq!(root.to_string(), "");
    }
}
