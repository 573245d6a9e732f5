//! The node port range: a port is taken per protocol, so TCP and UDP of one service may share a number.

use std::collections::BTreeSet;

use thiserror::Error;

/// A node port range that cannot be used.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("node port range {first}-{last} is empty or starts at 0")]
pub struct PortRangeError {
    /// Lowest port.
    pub first: u16,
    /// Highest port.
    pub last: u16,
}

/// A transport protocol of a service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// Reads `spec.ports[].protocol`; absent is TCP.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "" | "TCP" => Some(Self::Tcp),
            "UDP" => Some(Self::Udp),
            "SCTP" => Some(Self::Sctp),
            _ => None,
        }
    }
}

/// The node ports and what is taken of them.
#[derive(Debug, Clone)]
pub struct PortRange {
    first: u16,
    last: u16,
    taken: BTreeSet<(u16, Protocol)>,
    cursor: u16,
}

impl PortRange {
    /// An empty range from `first` to `last`, both included.
    pub fn new(first: u16, last: u16) -> Result<Self, PortRangeError> {
        if first == 0 || last < first {
            return Err(PortRangeError { first, last });
        }
        Ok(Self { first, last, taken: BTreeSet::new(), cursor: first })
    }

    /// Lowest and highest port.
    pub fn bounds(&self) -> (u16, u16) {
        (self.first, self.last)
    }

    /// Whether the port lies in the range.
    pub fn contains(&self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// Takes this very port; false when it is taken or outside the range.
    pub fn take(&mut self, port: u16, protocol: Protocol) -> bool {
        self.contains(port) && self.taken.insert((port, protocol))
    }

    /// Takes a port that no protocol uses; `None` when there is none.
    pub fn take_next(&mut self, protocol: Protocol) -> Option<u16> {
        let count = u32::from(self.last - self.first) + 1;
        for step in 0..count {
            let offset = (u32::from(self.cursor - self.first) + step) % count;
            let port = self.first + u16::try_from(offset).ok()?;
            let used = self.taken.range((port, Protocol::Tcp)..=(port, Protocol::Sctp)).next().is_some();
            if !used {
                self.taken.insert((port, protocol));
                self.cursor = if port == self.last { self.first } else { port + 1 };
                return Some(port);
            }
        }
        None
    }

    /// Gives a port back; false when it was not taken.
    pub fn release(&mut self, port: u16, protocol: Protocol) -> bool {
        self.taken.remove(&(port, protocol))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_each_port_once() {
        let mut range = PortRange::new(30000, 30002).unwrap();
        assert!(range.take(30001, Protocol::Udp));
        assert!(!range.take(30001, Protocol::Udp));
        assert!(range.take(30001, Protocol::Tcp));
        assert!(!range.take(29999, Protocol::Tcp));
        assert_eq!(range.take_next(Protocol::Tcp), Some(30000));
        assert_eq!(range.take_next(Protocol::Tcp), Some(30002));
        assert_eq!(range.take_next(Protocol::Tcp), None);
        assert!(range.release(30000, Protocol::Tcp));
        assert!(!range.release(30000, Protocol::Tcp));
        assert_eq!(range.take_next(Protocol::Udp), Some(30000));
    }

    #[test]
    fn bounds_are_checked() {
        assert!(PortRange::new(0, 10).is_err());
        assert!(PortRange::new(10, 9).is_err());
        let mut top = PortRange::new(65535, 65535).unwrap();
        assert_eq!(top.take_next(Protocol::Tcp), Some(65535));
        assert_eq!(top.take_next(Protocol::Tcp), None);
    }
}
