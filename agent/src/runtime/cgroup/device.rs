//! Which devices a container may use. The list is one: in v1 words, from which the v2 program is
//! assembled, so that both kinds of host allow the same.
#![expect(unsafe_code, reason = "bpf(2) takes pointers in its attributes")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

/// Allowed devices: making any node, and using null, zero, full, tty, random, urandom, ptmx and
/// terminals. `type major:minor access`, in the form of v1's `devices.allow`.
pub(super) const ALLOWED: [&str; 10] = [
    "c *:* m",
    "b *:* m",
    "c 1:3 rwm",
    "c 1:5 rwm",
    "c 1:7 rwm",
    "c 1:8 rwm",
    "c 1:9 rwm",
    "c 5:0 rwm",
    "c 5:2 rwm",
    "c 136:* rwm",
];

#[derive(Debug, PartialEq, Eq)]
struct Rule {
    block: bool,
    major: Option<i32>,
    minor: Option<i32>,
    /// BPF_DEVCG_ACC_MKNOD 1, READ 2, WRITE 4.
    access: i32,
}

fn parse(line: &str) -> Option<Rule> {
    let mut fields = line.split(' ');
    let block = match fields.next()? {
        "b" => true,
        "c" => false,
        _ => return None,
    };
    let (major, minor) = fields.next()?.split_once(':')?;
    let number = |s: &str| if s == "*" { Some(None) } else { s.parse().ok().map(Some) };
    let bit = |c| match c {
        'm' => Some(1),
        'r' => Some(2),
        'w' => Some(4),
        _ => None,
    };
    let access = fields.next()?.chars().try_fold(0, |bits, c| Some(bits | bit(c)?))?;
    Some(Rule { block, major: number(major)?, minor: number(minor)?, access })
}

/// One eBPF instruction.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Insn {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn insn(code: u8, dst: u8, src: u8, offset: i16, immediate: i32) -> Insn {
    Insn { code, registers: dst | (src << 4), offset, immediate }
}

const LOAD_WORD: u8 = 0x61; // LDX MEM W
const MOV: u8 = 0xbf; // ALU64 MOV X
const MOV_K: u8 = 0xb7; // ALU64 MOV K
const AND_K: u8 = 0x57; // ALU64 AND K
const SHIFT_RIGHT_K: u8 = 0x77; // ALU64 RSH K
const JUMP_NOT_K: u8 = 0x55; // JMP JNE K
const EXIT: u8 = 0x95;

/// A program over `struct bpf_cgroup_dev_ctx { access_type, major, minor }` that returns 1 for what some
/// rule allows and 0 for the rest.
fn assemble(rules: &[Rule]) -> Vec<Insn> {
    // r2 type, r3 access, r4 major, r5 minor
    let mut program = vec![
        insn(LOAD_WORD, 2, 1, 0, 0),
        insn(MOV, 3, 2, 0, 0),
        insn(AND_K, 2, 0, 0, 0xffff),
        insn(SHIFT_RIGHT_K, 3, 0, 0, 16),
        insn(LOAD_WORD, 4, 1, 4, 0),
        insn(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules {
        let mut body = vec![(2, if rule.block { 1 } else { 2 })]; // BPF_DEVCG_DEV_BLOCK, _CHAR
        body.extend(rule.major.map(|m| (4, m)));
        body.extend(rule.minor.map(|m| (5, m)));
        // Behind the comparisons: is any access asked for that the rule lacks?
        let tail = if rule.access == 7 { 2 } else { 5 };
        let count = body.len();
        for (i, (register, value)) in body.into_iter().enumerate() {
            let over = (count - i - 1 + tail) as i16;
            program.push(insn(JUMP_NOT_K, register, 0, over, value));
        }
        if rule.access != 7 {
            program.push(insn(MOV, 1, 3, 0, 0));
            program.push(insn(AND_K, 1, 0, 0, !rule.access & 7));
            program.push(insn(JUMP_NOT_K, 1, 0, 2, 0));
        }
        program.push(insn(MOV_K, 0, 0, 0, 1));
        program.push(insn(EXIT, 0, 0, 0, 0));
    }
    program.push(insn(MOV_K, 0, 0, 0, 0));
    program.push(insn(EXIT, 0, 0, 0, 0));
    program
}

/// Loads the program and attaches it to a v2 group, beside those of its parents.
pub(super) fn attach(group: &Path) -> io::Result<()> {
    let rules: Vec<Rule> = ALLOWED.iter().filter_map(|l| parse(l)).collect();
    let program = load(&assemble(&rules))?;
    let group = File::open(group)?;
    #[repr(C)]
    struct Attach {
        target_fd: u32,
        attach_bpf_fd: u32,
        attach_type: u32,
        attach_flags: u32,
    }
    let attributes = Attach {
        target_fd: group.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: 6,  // BPF_CGROUP_DEVICE
        attach_flags: 2, // BPF_F_ALLOW_MULTI
    };
    const BPF_PROG_ATTACH: libc::c_int = 8;
    // SAFETY: the attributes hold no pointers and live through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attributes, size_of::<Attach>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn load(program: &[Insn]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        instructions: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
    }
    let attributes = Load {
        kind: 15, // BPF_PROG_TYPE_CGROUP_DEVICE
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"sheave_devices\0\0",
    };
    const BPF_PROG_LOAD: libc::c_int = 5;
    // SAFETY: the instructions and the license outlive the call; the kernel copies both.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attributes, size_of::<Load>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the few instructions that `assemble` uses.
    fn run(program: &[Insn], block: bool, access: u64, major: u64, minor: u64) -> u64 {
        let kind = if block { 1 } else { 2 };
        let context = [kind | (access << 16), major, minor];
        let mut r = [0u64; 11];
        let mut pc = 0usize;
        loop {
            let i = program[pc];
            let (dst, src) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            pc += 1;
            match i.code {
                LOAD_WORD => r[dst] = context[usize::try_from(i.offset).unwrap() / 4],
                MOV => r[dst] = r[src],
                MOV_K => r[dst] = i.immediate as u64,
                AND_K => r[dst] &= i.immediate as u64,
                SHIFT_RIGHT_K => r[dst] >>= i.immediate,
                JUMP_NOT_K if r[dst] != i.immediate as u64 => pc += usize::try_from(i.offset).unwrap(),
                JUMP_NOT_K => {}
                EXIT => return r[0],
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn every_line_of_the_list_is_understood() {
        assert!(ALLOWED.iter().all(|l| parse(l).is_some()));
        assert_eq!(parse("c 1:3 rx"), None);
        assert_eq!(parse("a *:* rwm"), None);
    }

    #[test]
    fn the_program_allows_what_the_list_allows() {
        let rules: Vec<Rule> = ALLOWED.iter().filter_map(|l| parse(l)).collect();
        let program = assemble(&rules);
        const MKNOD: u64 = 1;
        const READ: u64 = 2;
        const WRITE: u64 = 4;
        assert_eq!(run(&program, false, READ | WRITE, 1, 3), 1);
        assert_eq!(run(&program, false, READ | WRITE, 136, 42), 1);
        assert_eq!(run(&program, false, READ, 1, 1), 0); // /dev/mem
        assert_eq!(run(&program, true, READ, 8, 0), 0);
        assert_eq!(run(&program, true, MKNOD, 8, 0), 1);
        assert_eq!(run(&program, true, MKNOD | READ, 8, 0), 0);
        assert_eq!(run(&program, true, READ, 1, 3), 0);
    }
}
