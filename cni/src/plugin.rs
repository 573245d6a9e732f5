//! The plugin. Invariant: standard output holds one JSON document or nothing; whatever is wrong with a call is found
//! before anything is touched; a call is over within ten seconds; and disconnecting succeeds also where the agent is
//! away: then it is written down for it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use serde_json::Value;

use crate::call::{Call, Command};
use crate::config::Head;
use crate::delegate;
use crate::error::{Error, code};
use crate::spool::Spool;
use crate::version::Version;
use crate::wire::{self, Request};

/// From start to end: runtimes wait longer, but not much.
const CALL_TIMEOUT_MS: u64 = 10_000;
/// What is left of it for the spool, or for taking an address back, when the agent has not answered.
const RESERVE_MS: u64 = 1_000;

const ABOUT: &str = "sheave-cni connects containers to the network of the Sheave agent on this node. Container \
    runtimes start it as the specification of the Container Network Interface says (CNI_COMMAND and the like).";

/// Serves the call that the environment and standard input make.
pub fn run() -> ExitCode {
    let start = Instant::now();
    let mut version = Version::NEWEST;
    let printed = match answer(&mut version, start) {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(value)) => (value, ExitCode::SUCCESS),
        Err(error) => (error.to_value(version), ExitCode::FAILURE),
    };
    let mut out = io::stdout().lock();
    let written = writeln!(out, "{}", printed.0).and_then(|()| out.flush());
    if let Err(error) = written {
        eprintln!("sheave-cni: writing the answer: {error}");
        return ExitCode::FAILURE;
    }
    printed.1
}

fn answer(version: &mut Version, start: Instant) -> Result<Option<Value>, Error> {
    let variable = |name: &str| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
    let Some(call) = Call::read(variable)? else {
        eprintln!("{ABOUT} Versions: {}", Version::ALL.map(|v| v.to_string()).join(", "));
        return Ok(None);
    };
    if call.command == Command::Version {
        return Ok(Some(Version::answer()));
    }
    let mut text = Vec::new();
    let limit = u64::try_from(wire::MESSAGE_BYTES_MAX / 2).unwrap_or(u64::MAX);
    io::stdin()
        .lock()
        .take(limit)
        .read_to_end(&mut text)
        .map_err(|e| Error::new(code::IO, format!("reading the configuration from standard input: {e}")))?;
    let config: Value = serde_json::from_slice(&text).map_err(|e| {
        Error::new(code::DECODE, format!("the configuration on standard input is not JSON: {e}"))
    })?;
    if let Some(text) = config.get("cniVersion").and_then(Value::as_str) {
        *version = Version::parse(text).unwrap_or(Version::NEWEST);
    }
    let head = Head::read(&config)?;
    allowed(call.command, head.version)?;
    let deadline = start + Duration::from_millis(CALL_TIMEOUT_MS);
    Session { call, head, config, text, deadline }.serve()
}

/// Refuses verbs that the configuration's version does not have.
fn allowed(command: Command, version: Version) -> Result<(), Error> {
    let since = match command {
        Command::Check => Version::V0_4_0,
        Command::Gc | Command::Status => Version::V1_1_0,
        Command::Add | Command::Del | Command::Version => return Ok(()),
    };
    if version >= since {
        return Ok(());
    }
    let message =
        format!("config version does not allow {}: {version} is older than {since}", command.name());
    Err(Error::new(code::INCOMPATIBLE_VERSION, message))
}

/// The agent's answer, if it came.
enum Asked {
    Answered(wire::Reply),
    /// Why there was none.
    Away(String),
}

struct Session {
    call: Call,
    head: Head,
    config: Value,
    /// The configuration as it came.
    text: Vec<u8>,
    deadline: Instant,
}

impl Session {
    fn serve(&self) -> Result<Option<Value>, Error> {
        match self.call.command {
            Command::Add => self.add().map(Some),
            Command::Del => self.del().map(|()| None),
            Command::Check => self.check().map(|()| None),
            Command::Status => self.status().map(|()| None),
            Command::Gc => self.gc().map(|()| None),
            Command::Version => Ok(Some(Version::answer())),
        }
    }

    fn add(&self) -> Result<Value, Error> {
        let netns = self.netns()?;
        let Some(ipam) = &self.head.ipam else {
            return self.connect(&netns, None);
        };
        // The delegate would take back, with our DEL for a failed ADD, what an earlier ADD was given.
        self.expect(self.ask("PROBE", Some(&netns), None), code::TRY_LATER)?;
        let given = self.delegate(ipam, Command::Add).and_then(|given| {
            given.ok_or_else(|| Error::new(code::DECODE, format!("ipam.type {ipam:?} gave no result")))
        });
        given.and_then(|given| self.connect(&netns, Some(given))).map_err(|error| {
            match self.delegate(ipam, Command::Del) {
                Ok(_) => error,
                Err(second) => {
                    let more = format!("and taking back what {ipam} gave failed: {second}");
                    let details = [error.details.as_str(), &more].join("; ");
                    error.with(details.trim_start_matches("; "))
                }
            }
        })
    }

    fn connect(&self, netns: &File, ipam: Option<Value>) -> Result<Value, Error> {
        let result = self.expect(self.ask("ADD", Some(netns), ipam), code::TRY_LATER)?;
        result.ok_or_else(|| Error::new(code::DECODE, "the agent gave no result"))
    }

    fn del(&self) -> Result<(), Error> {
        // Stopped half-way, what a delegate holds would stay held.
        let mut signals = SigSet::empty();
        [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().for_each(|signal| signals.add(signal));
        signals.thread_block().map_err(|e| Error::new(code::IO, format!("blocking signals: {e}")))?;
        match self.ask("DEL", None, None) {
            Asked::Answered(reply) => reply.map(drop)?,
            Asked::Away(why) => self.write_down(&why)?,
        }
        match &self.head.ipam {
            Some(ipam) => self.delegate(ipam, Command::Del).map(drop),
            None => Ok(()),
        }
    }

    /// Leaves the call for the agent that comes.
    fn write_down(&self, why: &str) -> Result<(), Error> {
        let dir = self.head.spool.as_deref().unwrap_or(Path::new(wire::SPOOL));
        let failed = |error: io::Error| {
            let message = format!("{why}; and the call could not be kept in {}: {error}", dir.display());
            Error::new(code::TRY_LATER, message)
        };
        let spool = Spool::lock(dir, self.deadline).map_err(failed)?;
        // An agent that came meanwhile has emptied the spool before it took this lock off.
        if let Asked::Answered(reply) = self.ask("DEL", None, None) {
            return reply.map(drop);
        }
        spool.push(&self.request("DEL", None).encode()).map_err(failed)?;
        eprintln!("sheave-cni: {why}; it will disconnect {} when it is back", self.call.container_id);
        Ok(())
    }

    fn check(&self) -> Result<(), Error> {
        if self.config.get("prevResult").is_none_or(Value::is_null) {
            let message = "prevResult is missing: CHECK compares with what ADD answered";
            return Err(Error::new(code::BAD_CONFIG, message));
        }
        let netns = self.netns()?;
        if let Some(ipam) = &self.head.ipam {
            self.delegate(ipam, Command::Check)?;
        }
        self.expect(self.ask("CHECK", Some(&netns), None), code::TRY_LATER).map(drop)
    }

    fn status(&self) -> Result<(), Error> {
        self.expect(self.ask("STATUS", None, None), code::NOT_AVAILABLE)?;
        match &self.head.ipam {
            Some(ipam) => self.delegate(ipam, Command::Status).map(drop),
            None => Ok(()),
        }
    }

    fn gc(&self) -> Result<(), Error> {
        let ours = self.expect(self.ask("GC", None, None), code::TRY_LATER).map(drop);
        let theirs = match &self.head.ipam {
            Some(ipam) => self.delegate(ipam, Command::Gc).map(drop),
            None => Ok(()),
        };
        match (ours, theirs) {
            (Err(ours), Err(theirs)) => Err(ours.with(format!("and ipam.type: {theirs}"))),
            (ours, theirs) => ours.and(theirs),
        }
    }

    fn delegate(&self, ipam: &str, command: Command) -> Result<Option<Value>, Error> {
        // What it gives must still be connected, or taken back.
        let reserve = if command == Command::Add { 3 * RESERVE_MS } else { 0 };
        let deadline = self.deadline - Duration::from_millis(reserve);
        delegate::run(ipam, &self.call.path, command, &self.text, deadline)
    }

    /// Opens the container's namespace and makes sure that it is one, and not our own.
    fn netns(&self) -> Result<File, Error> {
        let path = &self.call.netns;
        let bad = |why: String| Error::new(code::BAD_NETNS, format!("CNI_NETNS {path}: {why}"));
        let file = File::open(path).map_err(|error| bad(error.to_string()))?;
        let kind = fstatfs(&file).map_err(|error| bad(error.to_string()))?.filesystem_type();
        if kind != NSFS_MAGIC {
            return Err(bad("it is not a network namespace".to_owned()));
        }
        let own = File::open("/proc/self/ns/net").and_then(|own| own.metadata());
        let (own, given) = (own, file.metadata());
        if let (Ok(own), Ok(given)) = (own, given)
            && (own.dev(), own.ino()) == (given.dev(), given.ino())
            && !self.call.netns_override
        {
            return Err(bad("it is the plugin's own network namespace".to_owned()));
        }
        Ok(file)
    }

    fn request(&self, command: &str, ipam: Option<Value>) -> Request {
        Request {
            command: command.to_owned(),
            container_id: self.call.container_id.clone(),
            netns: self.call.netns.clone(),
            ifname: self.call.ifname.clone(),
            args: self.call.args.clone(),
            config: self.config.clone(),
            ipam,
        }
    }

    fn ask(&self, command: &str, netns: Option<&File>, ipam: Option<Value>) -> Asked {
        let path = self.head.socket.as_deref().unwrap_or(Path::new(wire::SOCKET));
        let deadline = self.deadline - Duration::from_millis(RESERVE_MS);
        let away = |what: &str, error: io::Error| {
            Asked::Away(format!("the agent is away ({what} {}: {error})", path.display()))
        };
        let stream = match wire::dial(path, deadline) {
            Ok(stream) => stream,
            Err(error) => return away("connect to", error),
        };
        match wire::peer_uid(&stream) {
            Ok(0) => {}
            Ok(uid) => return away("ask", io::Error::other(format!("user {uid} listens there, not root"))),
            Err(error) => return away("look who listens on", error),
        }
        let request = self.request(command, ipam).encode();
        if let Err(error) = wire::send(&stream, &request, netns.map(AsFd::as_fd), deadline) {
            return away("write to", error);
        }
        match wire::receive(&stream, deadline) {
            Ok((reply, _)) => Asked::Answered(wire::decode_reply(&reply)),
            Err(error) => away("wait for an answer on", error),
        }
    }

    fn expect(&self, asked: Asked, code_if_away: u32) -> wire::Reply {
        match asked {
            Asked::Answered(reply) => reply,
            Asked::Away(why) => {
                Err(Error::new(code_if_away, why).with("is sheave agent running on this node?"))
            }
        }
    }
}
