//! Extended attributes by descriptor: the one thing here that needs a raw system call.

#![expect(unsafe_code, reason = "fsetxattr(2) has no safe wrapper among the dependencies")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Sets the attribute `name` of the file behind `fd` (not an `O_PATH` descriptor).
pub(super) fn set(fd: impl AsFd, name: &[u8], value: &[u8]) -> io::Result<()> {
    let name = CString::new(name).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    // SAFETY: `name` is NUL-terminated and `value` is valid for `value.len()` bytes during the call; the
    // descriptor is borrowed for its length.
    let done = unsafe {
        libc::fsetxattr(fd.as_fd().as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// True where the attribute `name` of the file behind `fd` is `value`.
pub(super) fn has(fd: impl AsFd, name: &[u8], value: &[u8]) -> io::Result<bool> {
    let name = CString::new(name).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
    let mut found = vec![0_u8; value.len() + 1];
    // SAFETY: `name` is NUL-terminated and `found` is writable for `found.len()` bytes during the call; the
    // descriptor is borrowed for its length.
    let length = unsafe {
        libc::fgetxattr(fd.as_fd().as_raw_fd(), name.as_ptr(), found.as_mut_ptr().cast(), found.len())
    };
    match usize::try_from(length) {
        Ok(length) => Ok(&found[..length] == value),
        Err(_) => match io::Error::last_os_error() {
            // Absent, not supported, or longer than what is looked for.
            e if matches!(e.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP | libc::ERANGE)) => {
                Ok(false)
            }
            e => Err(e),
        },
    }
}
