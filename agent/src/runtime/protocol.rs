//! What the agent and a pod's shim say to each other: JSON messages behind a length of four bytes
//! (little-endian) on a stream socket. Invariant: an agent never has to be as new as the shim it talks to:
//! unknown fields are skipped, fields are only ever added, and `VERSION` changes if that is not enough.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::cgroup::Hierarchies;
use super::record::{ContainerRecord, ExecOutput, Exit};
use super::spec::{ContainerSpec, ExecSpec, SandboxSpec};

/// Changes when a shim of another version could not be talked to.
pub(super) const VERSION: u32 = 1;
/// Longest message that either side takes.
pub(super) const MESSAGE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Names in a pod's run directory.
pub(super) mod names {
    /// [`super::Boot`], written by the agent before the shim starts.
    pub(crate) const BOOT: &str = "boot.json";
    /// Locked (`fcntl`) by the shim as long as it lives.
    pub(crate) const LOCK: &str = "lock";
    /// The shim's socket.
    pub(crate) const SOCKET: &str = "sock";
    /// The shim's own messages.
    pub(crate) const LOG: &str = "shim.log";
    /// Directory of `hosts`, `hostname` and `resolv.conf`.
    pub(crate) const ETC: &str = "etc";
    /// Where the pod's `/dev/shm` is mounted, in the shim's mount namespace only.
    pub(crate) const SHM: &str = "shm";
    /// Where root filesystems are put together, each in its own mount namespace.
    pub(crate) const ROOTFS: &str = "rootfs";
    /// `containers/<name>/<attempt>/`.
    pub(crate) const CONTAINERS: &str = "containers";
    /// [`super::ContainerRecord`] of a run that was started.
    pub(crate) const RECORD: &str = "record.json";
    /// [`super::Exit`] of a run that ended.
    pub(crate) const EXIT: &str = "exit.json";
}

/// What a shim is told when it starts.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Boot {
    pub(super) version: u32,
    pub(super) spec: SandboxSpec,
    pub(super) hierarchies: Hierarchies,
    /// Parent of the pod's writable layers.
    pub(super) rootfs_dir: PathBuf,
    /// Parent of the pod's logs.
    pub(super) log_dir: PathBuf,
}

/// The one line that a starting shim writes to its standard output.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Ready {
    Up { init_pid: i32 },
    Failed(Fault),
}

/// A request and the number that its answer carries.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Call {
    pub(super) id: u64,
    pub(super) request: Request,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Request {
    /// First on every connection. With `after` the events behind that number follow the answer.
    Hello {
        after: Option<u64>,
    },
    StartContainer(Box<ContainerSpec>),
    Signal {
        container: String,
        signal: i32,
    },
    Kill {
        container: String,
    },
    Exec {
        container: String,
        spec: ExecSpec,
    },
    /// Kill everything, collect every status, answer, end.
    Stop,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Message {
    Answer { id: u64, result: Result<Box<Answer>, Fault> },
    Event { seq: u64, event: Event },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Answer {
    Hello(Snapshot),
    Container(ContainerRecord),
    Exec(ExecOutput),
    Done,
}

/// All that a shim knows, as of event `seq`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Snapshot {
    pub(super) version: u32,
    pub(super) seq: u64,
    pub(super) init_pid: i32,
    pub(super) spec: SandboxSpec,
    pub(super) containers: Vec<ContainerRecord>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Event {
    Exited {
        name: String,
        attempt: u32,
        exit: Exit,
    },
    /// The process that holds the namespaces ended.
    HolderDied,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FaultKind {
    Failed,
    NotRunning,
    Exists,
    Invalid,
}

/// Why a request was not met.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fault {
    pub(super) kind: FaultKind,
    /// The step that failed.
    pub(super) stage: String,
    pub(super) message: String,
    /// 0 where no system call is involved.
    pub(super) errno: i32,
}

impl Fault {
    pub(super) fn new(kind: FaultKind, stage: impl Into<String>, message: impl Into<String>) -> Fault {
        Fault { kind, stage: stage.into(), message: message.into(), errno: 0 }
    }

    /// A failed step.
    pub(super) fn failed(stage: impl Into<String>, message: impl Into<String>) -> Fault {
        Fault::new(FaultKind::Failed, stage, message)
    }

    /// A failed step and the error behind it.
    pub(super) fn io(stage: impl Into<String>, error: &std::io::Error) -> Fault {
        let errno = error.raw_os_error().unwrap_or(0);
        Fault { errno, ..Fault::failed(stage, error.to_string()) }
    }
}

/// Turns a failed system call into a [`Fault`] of a stage.
pub(super) trait Stage<T> {
    fn stage(self, stage: &str) -> Result<T, Fault>;
    fn stage_with(self, stage: impl FnOnce() -> String) -> Result<T, Fault>;
}

impl<T, E: Into<std::io::Error>> Stage<T> for Result<T, E> {
    fn stage(self, stage: &str) -> Result<T, Fault> {
        self.map_err(|e| Fault::io(stage, &e.into()))
    }

    fn stage_with(self, stage: impl FnOnce() -> String) -> Result<T, Fault> {
        self.map_err(|e| Fault::io(stage(), &e.into()))
    }
}

/// A message with its length in front.
pub(super) fn encode<T: Serialize>(message: &T) -> std::io::Result<Vec<u8>> {
    let mut out = vec![0; 4];
    serde_json::to_writer(&mut out, message)?;
    let length = out.len() - 4;
    if length > MESSAGE_BYTES_MAX {
        return Err(std::io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    out[..4].copy_from_slice(&(length as u32).to_le_bytes());
    Ok(out)
}

/// Takes the first whole message out of `buffer`; `None` if there is none yet.
pub(super) fn decode<T: serde::de::DeserializeOwned>(buffer: &mut Vec<u8>) -> std::io::Result<Option<T>> {
    let Some(head) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_le_bytes(*head) as usize;
    if length > MESSAGE_BYTES_MAX {
        return Err(std::io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    let Some(body) = buffer.get(4..4 + length) else { return Ok(None) };
    let message = serde_json::from_slice(body)?;
    buffer.drain(..4 + length);
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_out_as_they_went_in_however_they_are_cut() {
        let calls = [
            Call { id: 1, request: Request::Hello { after: None } },
            Call { id: 2, request: Request::Signal { container: "a".into(), signal: 15 } },
        ];
        let wire: Vec<u8> = calls.iter().flat_map(|c| encode(c).unwrap()).collect();
        let (mut buffer, mut seen) = (Vec::new(), Vec::new());
        for byte in wire {
            buffer.push(byte);
            while let Some(call) = decode::<Call>(&mut buffer).unwrap() {
                seen.push(call.id);
            }
        }
        assert_eq!(seen, [1, 2]);
        assert!(buffer.is_empty());
    }

    #[test]
    fn junk_and_giants_are_errors() {
        assert!(decode::<Call>(&mut vec![0xff; 8]).is_err());
        assert!(decode::<Call>(&mut vec![2, 0, 0, 0, b'{', b'{']).is_err());
        assert!(encode(&"x".repeat(MESSAGE_BYTES_MAX)).is_err());
    }
}
