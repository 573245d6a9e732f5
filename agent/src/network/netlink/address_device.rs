//! A device that only carries addresses. Invariant: what is on a device that was made for this is ours; of a device
//! that others use too, only what the caller names is touched.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use super::{Connection, LinkChange};

/// Where service addresses are kept, so that the kernel takes packets to them as its own.
#[derive(Debug)]
pub(crate) struct AddressDevice {
    connection: Connection,
    index: u32,
    own: bool,
}

impl AddressDevice {
    /// Finds or makes the dummy device `name` in this thread's network namespace and brings it up; where the kernel
    /// has no dummy devices, the loopback device takes its place.
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        let mut connection = Connection::open()?;
        if connection.link(name)?.is_none() {
            match connection.create_dummy(name) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    return Self::loopback();
                }
                Err(error) => return Err(error),
            }
        }
        let link = connection.link(name)?.ok_or(io::ErrorKind::NotFound)?;
        connection.set_link(link.index, &LinkChange { up: true, ..LinkChange::default() })?;
        Ok(Self { connection, index: link.index, own: true })
    }

    /// The loopback device.
    pub(crate) fn loopback() -> io::Result<Self> {
        let mut connection = Connection::open()?;
        let lo = connection.links()?.into_iter().find(|link| link.loopback);
        let index = lo.ok_or(io::ErrorKind::NotFound)?.index;
        Ok(Self { connection, index, own: false })
    }

    /// Whether it was made for this; otherwise it is the loopback device.
    pub(crate) fn is_own(&self) -> bool {
        self.own
    }

    /// Whether it is still there.
    pub(crate) fn exists(&mut self, name: &str) -> io::Result<bool> {
        Ok(!self.own || self.connection.link(name)?.is_some_and(|link| link.index == self.index && link.up))
    }

    /// Its addresses; link-local ones are the kernel's affair.
    pub(crate) fn addresses(&mut self) -> io::Result<BTreeSet<IpAddr>> {
        let index = self.index;
        let all = self.connection.addresses()?.into_iter().filter(|at| at.link == index).map(|at| at.ip);
        Ok(all.filter(|ip| !matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())).collect())
    }

    /// Gives it an address that this host answers to, but never chooses as the source of what it sends elsewhere.
    pub(crate) fn add(&mut self, ip: IpAddr) -> io::Result<()> {
        self.connection.set_quiet_address(self.index, ip)
    }

    /// Takes an address away; one that is not there is fine.
    pub(crate) fn remove(&mut self, ip: IpAddr) -> io::Result<()> {
        match self.connection.delete_address(self.index, ip) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::ENODEV)) => Ok(()),
            done => done,
        }
    }

    /// Removes the device `name`; false where there was none.
    pub(crate) fn delete(name: &str) -> io::Result<bool> {
        Connection::open()?.delete_link(name)
    }
}
