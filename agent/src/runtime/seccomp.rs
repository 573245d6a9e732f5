//! The built-in system call filter. Invariant: what is not listed is refused; the list is made of libc's
//! constants (five newer numbers aside), so a name that does not exist does not compile, and nothing fails open at run time.
//!
//! Two programs are installed. The first is the allow-list (refusal: EPERM). The second comes in front of
//! it: other ABIs are killed (i386 and x32 would otherwise bypass the numbers), and `clone3` — whose flags
//! lie behind a pointer that a filter cannot follow — and calls newer than the list get ENOSYS, upon which
//! C libraries fall back to the calls that are listed.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};

use super::capability::Capability;

macro_rules! calls {
    ($($name:ident)*) => { &[$(libc::$name),*] };
}

/// Allowed for everyone, on every architecture.
#[rustfmt::skip]
const COMMON: &[libc::c_long] = calls! {
    SYS_accept SYS_accept4 SYS_adjtimex SYS_bind SYS_brk SYS_capget SYS_capset SYS_chdir
    SYS_clock_adjtime SYS_clock_getres SYS_clock_gettime SYS_clock_nanosleep SYS_close SYS_close_range
    SYS_connect SYS_copy_file_range SYS_dup SYS_dup3 SYS_epoll_create1 SYS_epoll_ctl
    SYS_epoll_pwait SYS_epoll_pwait2 SYS_eventfd2 SYS_execve SYS_execveat SYS_exit SYS_exit_group
    SYS_faccessat SYS_faccessat2 SYS_fadvise64 SYS_fallocate SYS_fanotify_mark SYS_fchdir SYS_fchmod
    SYS_fchmodat SYS_fchmodat2 SYS_fchown SYS_fchownat SYS_fcntl SYS_fdatasync SYS_fgetxattr SYS_flistxattr
    SYS_flock SYS_fremovexattr SYS_fsetxattr SYS_fstat SYS_fstatfs SYS_fsync SYS_ftruncate SYS_futex
    SYS_futex_waitv SYS_getcpu SYS_getcwd SYS_getdents64
    SYS_getegid SYS_geteuid SYS_getgid SYS_getgroups SYS_getitimer SYS_getpeername SYS_getpgid SYS_getpid
    SYS_getppid SYS_getpriority SYS_getrandom SYS_getresgid SYS_getresuid SYS_getrlimit SYS_get_robust_list
    SYS_getrusage SYS_getsid SYS_getsockname SYS_getsockopt SYS_gettid SYS_gettimeofday SYS_getuid
    SYS_getxattr SYS_inotify_add_watch SYS_inotify_init1 SYS_inotify_rm_watch SYS_io_cancel SYS_ioctl
    SYS_io_destroy SYS_io_getevents SYS_ioprio_get SYS_ioprio_set SYS_io_setup
    SYS_io_submit SYS_kill SYS_landlock_add_rule SYS_landlock_create_ruleset SYS_landlock_restrict_self
    SYS_lgetxattr SYS_linkat SYS_listen SYS_listxattr SYS_llistxattr SYS_lremovexattr SYS_lseek
    SYS_lsetxattr SYS_madvise SYS_membarrier SYS_memfd_create SYS_memfd_secret
    SYS_mincore SYS_mkdirat SYS_mknodat SYS_mlock SYS_mlock2 SYS_mlockall SYS_mmap SYS_mprotect
    SYS_mq_getsetattr SYS_mq_notify SYS_mq_open SYS_mq_timedreceive SYS_mq_timedsend SYS_mq_unlink
    SYS_mremap SYS_mseal SYS_msgctl SYS_msgget SYS_msgrcv SYS_msgsnd SYS_msync SYS_munlock SYS_munlockall
    SYS_munmap SYS_name_to_handle_at SYS_nanosleep SYS_newfstatat SYS_openat SYS_openat2 SYS_pidfd_open
    SYS_pidfd_send_signal SYS_pipe2 SYS_pkey_alloc SYS_pkey_free SYS_pkey_mprotect SYS_ppoll SYS_prctl
    SYS_pread64 SYS_preadv SYS_preadv2 SYS_prlimit64 SYS_process_mrelease SYS_process_vm_readv
    SYS_process_vm_writev SYS_pselect6 SYS_ptrace SYS_pwrite64 SYS_pwritev SYS_pwritev2 SYS_read
    SYS_readahead SYS_readlinkat SYS_readv SYS_recvfrom SYS_recvmmsg SYS_recvmsg SYS_remap_file_pages
    SYS_removexattr SYS_renameat SYS_renameat2 SYS_restart_syscall SYS_rseq SYS_rt_sigaction
    SYS_rt_sigpending SYS_rt_sigprocmask SYS_rt_sigqueueinfo SYS_rt_sigreturn SYS_rt_sigsuspend
    SYS_rt_sigtimedwait SYS_rt_tgsigqueueinfo SYS_sched_getaffinity SYS_sched_getattr SYS_sched_getparam
    SYS_sched_get_priority_max SYS_sched_get_priority_min SYS_sched_getscheduler SYS_sched_rr_get_interval
    SYS_sched_setaffinity SYS_sched_setattr SYS_sched_setparam SYS_sched_setscheduler SYS_sched_yield
    SYS_seccomp SYS_semctl SYS_semget SYS_semop SYS_semtimedop SYS_sendfile SYS_sendmmsg SYS_sendmsg
    SYS_sendto SYS_setfsgid SYS_setfsuid SYS_setgid SYS_setgroups SYS_setitimer SYS_setpgid SYS_setpriority
    SYS_setregid SYS_setresgid SYS_setresuid SYS_setreuid SYS_setrlimit SYS_set_robust_list SYS_setsid
    SYS_setsockopt SYS_set_tid_address SYS_setuid SYS_setxattr SYS_shmat SYS_shmctl SYS_shmdt SYS_shmget
    SYS_shutdown SYS_sigaltstack SYS_signalfd4 SYS_socketpair SYS_splice SYS_statfs SYS_statx SYS_symlinkat
    SYS_sync SYS_sync_file_range SYS_syncfs SYS_sysinfo SYS_tee SYS_tgkill SYS_timer_create
    SYS_timer_delete SYS_timerfd_create SYS_timerfd_gettime SYS_timerfd_settime SYS_timer_getoverrun
    SYS_timer_gettime SYS_timer_settime SYS_times SYS_tkill SYS_truncate SYS_umask SYS_uname SYS_unlinkat
    SYS_utimensat SYS_vmsplice SYS_wait4 SYS_waitid SYS_write SYS_writev
};

/// Allowed too, not yet among libc's constants; these numbers are the same on every architecture.
const NEWER: &[libc::c_long] = &[
    451, // cachestat
    453, // map_shadow_stack
    454, // futex_wake
    455, // futex_wait
    456, // futex_requeue
];

/// Older forms that newer architectures never had.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const NATIVE: &[libc::c_long] = calls! {
    SYS_access SYS_alarm SYS_arch_prctl SYS_chmod SYS_chown SYS_creat SYS_dup2 SYS_epoll_create
    SYS_epoll_ctl_old SYS_epoll_wait SYS_epoll_wait_old SYS_eventfd SYS_fork SYS_futimesat SYS_getdents
    SYS_getpgrp SYS_inotify_init SYS_lchown SYS_link SYS_lstat SYS_mkdir SYS_mknod SYS_modify_ldt SYS_open
    SYS_pause SYS_pipe SYS_poll SYS_readlink SYS_rename SYS_rmdir SYS_select SYS_signalfd SYS_stat
    SYS_symlink SYS_time SYS_unlink SYS_ustat SYS_utime SYS_utimes SYS_vfork
};
#[cfg(not(target_arch = "x86_64"))]
const NATIVE: &[libc::c_long] = &[];

/// Allowed with a capability.
#[rustfmt::skip]
const WITH_CAPABILITY: &[(Capability, &[libc::c_long])] = &[
    (Capability::DAC_READ_SEARCH, calls! { SYS_open_by_handle_at }),
    (Capability::SYS_ADMIN, calls! {
        SYS_bpf SYS_clone SYS_fanotify_init SYS_fsconfig SYS_fsmount SYS_fsopen SYS_fspick
        SYS_mount SYS_mount_setattr SYS_move_mount SYS_open_tree SYS_perf_event_open SYS_quotactl
        SYS_quotactl_fd SYS_setdomainname SYS_sethostname SYS_setns SYS_syslog SYS_umount2 SYS_unshare
    }),
    (Capability::SYS_BOOT, calls! { SYS_reboot }),
    (Capability::SYS_CHROOT, calls! { SYS_chroot }),
    (Capability::SYS_MODULE, calls! { SYS_delete_module SYS_finit_module SYS_init_module }),
    (Capability::SYS_PACCT, calls! { SYS_acct }),
    (Capability::SYS_PTRACE, calls! { SYS_kcmp SYS_pidfd_getfd SYS_process_madvise }),
    (Capability::SYS_TIME, calls! { SYS_clock_settime SYS_settimeofday }),
    (Capability::SYS_TTY_CONFIG, calls! { SYS_vhangup }),
    (Capability::SYS_NICE, calls! { SYS_get_mempolicy SYS_mbind SYS_set_mempolicy }),
    (Capability::SYSLOG, calls! { SYS_syslog }),
    (Capability::BPF, calls! { SYS_bpf }),
    (Capability::PERFMON, calls! { SYS_perf_event_open }),
];

/// CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
const NAMESPACE_FLAGS: u64 = 0x7e02_0000;
const AF_VSOCK: u64 = 40;

/// Both programs, in the order in which they must be installed.
pub(super) struct Programs {
    /// The allow-list.
    pub(super) allow: BpfProgram,
    /// What comes in front of it.
    pub(super) guard: BpfProgram,
}

/// Compiles the filter for a process with the capabilities of `bounding`.
pub(super) fn compile(bounding: u64) -> Result<Programs, seccompiler::Error> {
    let admin = Capability::SYS_ADMIN.is_in(bounding);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in COMMON.iter().chain(NEWER).chain(NATIVE) {
        rules.insert(*call, Vec::new());
    }
    rules.insert(libc::SYS_clone, vec![rule(&[masked(0, NAMESPACE_FLAGS, 0)])?]);
    rules.insert(libc::SYS_socket, vec![rule(&[(0, SeccompCmpOp::Ne, AF_VSOCK)])?]);
    let personas = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];
    let personas = personas.into_iter().map(|p| rule(&[(0, SeccompCmpOp::Eq, p)]));
    rules.insert(libc::SYS_personality, personas.collect::<Result<_, _>>()?);
    for (_, calls) in WITH_CAPABILITY.iter().filter(|(c, _)| c.is_in(bounding)) {
        rules.extend(calls.iter().map(|call| (*call, Vec::new())));
    }
    rules.insert(libc::SYS_clone3, Vec::new()); // the guard refuses it
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let errno = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, errno, SeccompAction::Allow, arch)?;
    Ok(Programs { allow: filter.try_into()?, guard: guard(admin) })
}

fn masked(argument: u8, mask: u64, value: u64) -> (u8, SeccompCmpOp, u64) {
    (argument, SeccompCmpOp::MaskedEq(mask), value)
}

fn rule(conditions: &[(u8, SeccompCmpOp, u64)]) -> Result<SeccompRule, seccompiler::Error> {
    let conditions = conditions
        .iter()
        .map(|(arg, op, value)| SeccompCondition::new(*arg, SeccompCmpArgLen::Dword, op.clone(), *value))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(SeccompRule::new(conditions)?)
}

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xc000_00b7;

/// Largest number that this list knows about; what is above is answered by ENOSYS, also x32's numbers.
fn newest_known() -> u32 {
    let conditional = WITH_CAPABILITY.iter().flat_map(|(_, calls)| calls.iter());
    COMMON
        .iter()
        .chain(NEWER)
        .chain(conditional)
        .copied()
        .max()
        .and_then(|n| u32::try_from(n).ok())
        .unwrap_or(0)
}

fn guard(allow_clone3: bool) -> BpfProgram {
    const LOAD: u16 = 0x20; // LD | W | ABS
    const EQUAL: u16 = 0x15; // JMP | JEQ | K
    const GREATER: u16 = 0x25; // JMP | JGT | K
    const RETURN: u16 = 0x06; // RET | K
    const ALLOW: u32 = 0x7fff_0000;
    const KILL: u32 = 0x8000_0000;
    const REFUSE: u32 = 0x0005_0000 | libc::ENOSYS as u32;
    let op = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    let clone3 = if allow_clone3 { u32::MAX } else { libc::SYS_clone3 as u32 };
    vec![
        op(LOAD, 0, 0, 4), // seccomp_data.arch
        op(EQUAL, 1, 0, AUDIT_ARCH),
        op(RETURN, 0, 0, KILL),
        op(LOAD, 0, 0, 0), // seccomp_data.nr
        op(EQUAL, 2, 0, clone3),
        op(GREATER, 1, 0, newest_known()),
        op(RETURN, 0, 0, ALLOW),
        op(RETURN, 0, 0, REFUSE),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOW: u32 = 0x7fff_0000;
    const EPERM: u32 = 0x0005_0000 | libc::EPERM as u32;
    const ENOSYS: u32 = 0x0005_0000 | libc::ENOSYS as u32;
    const KILL: u32 = 0x8000_0000;

    /// Interprets the classic BPF that seccomp programs consist of.
    fn run(program: &[sock_filter], arch: u32, nr: i64, arg0: u64) -> u32 {
        let mut data = [0u8; 64];
        data[..4].copy_from_slice(&(nr as u32).to_ne_bytes());
        data[4..8].copy_from_slice(&arch.to_ne_bytes());
        data[16..24].copy_from_slice(&arg0.to_ne_bytes());
        let (mut a, mut pc) = (0u32, 0usize);
        loop {
            let i = &program[pc];
            pc += 1;
            let jump = |taken: bool| usize::from(if taken { i.jt } else { i.jf });
            match i.code {
                0x20 => a = u32::from_ne_bytes(data[i.k as usize..][..4].try_into().unwrap()),
                0x05 => pc += i.k as usize,
                0x15 => pc += jump(a == i.k),
                0x25 => pc += jump(a > i.k),
                0x35 => pc += jump(a >= i.k),
                0x45 => pc += jump(a & i.k != 0),
                0x54 => a &= i.k,
                0x06 => return i.k,
                other => panic!("unknown instruction {other:#x}"),
            }
        }
    }

    /// The kernel takes the stricter of both results, the later program's where they are alike.
    fn verdict(bounding: u64, nr: i64, arg0: u64) -> u32 {
        let programs = compile(bounding).unwrap();
        let guard = run(&programs.guard, AUDIT_ARCH, nr, arg0);
        if guard == ALLOW { run(&programs.allow, AUDIT_ARCH, nr, arg0) } else { guard }
    }

    #[test]
    fn everyday_calls_pass_and_dangerous_ones_do_not() {
        for nr in [libc::SYS_read, libc::SYS_openat, libc::SYS_execve, libc::SYS_futex, libc::SYS_ptrace] {
            assert_eq!(verdict(0, nr, 0), ALLOW, "{nr}");
        }
        let refused = [
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_bpf,
            libc::SYS_keyctl,
            libc::SYS_kexec_load,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_perf_event_open,
            libc::SYS_init_module,
            libc::SYS_open_by_handle_at,
            libc::SYS_chroot,
            libc::SYS_clock_settime,
        ];
        for nr in refused {
            assert_eq!(verdict(0, nr, 0), EPERM, "{nr}");
        }
    }

    #[test]
    fn clone_may_not_make_namespaces_and_clone3_does_not_exist() {
        assert_eq!(verdict(0, libc::SYS_clone, 0x11), ALLOW);
        assert_eq!(verdict(0, libc::SYS_clone, libc::CLONE_NEWUSER as u64), EPERM);
        assert_eq!(verdict(0, libc::SYS_clone3, 0), ENOSYS);
        let admin = Capability::SYS_ADMIN.bit();
        assert_eq!(verdict(admin, libc::SYS_clone, libc::CLONE_NEWUSER as u64), ALLOW);
        assert_eq!(verdict(admin, libc::SYS_clone3, 0), ALLOW);
    }

    #[test]
    fn capabilities_open_their_calls() {
        assert_eq!(verdict(Capability::SYS_CHROOT.bit(), libc::SYS_chroot, 0), ALLOW);
        assert_eq!(verdict(Capability::SYS_TIME.bit(), libc::SYS_clock_settime, 0), ALLOW);
        assert_eq!(verdict(Capability::SYS_ADMIN.bit(), libc::SYS_init_module, 0), EPERM);
    }

    #[test]
    fn arguments_are_looked_at() {
        assert_eq!(verdict(0, libc::SYS_socket, libc::AF_INET as u64), ALLOW);
        assert_eq!(verdict(0, libc::SYS_socket, AF_VSOCK), EPERM);
        assert_eq!(verdict(0, libc::SYS_personality, 0x20008), ALLOW);
        assert_eq!(verdict(0, libc::SYS_personality, 0x40000), EPERM);
    }

    #[test]
    fn other_abis_and_unknown_numbers_do_not_get_through() {
        let programs = compile(u64::MAX).unwrap();
        const I386: u32 = 0x4000_0003;
        assert_eq!(run(&programs.guard, I386, 1, 0), KILL);
        assert_eq!(run(&programs.guard, AUDIT_ARCH, 0x4000_0000 | 1, 0), ENOSYS); // x32
        assert_eq!(run(&programs.guard, AUDIT_ARCH, i64::from(newest_known()) + 1, 0), ENOSYS);
    }

    #[test]
    fn the_programs_fit_the_kernels_bound() {
        let programs = compile(u64::MAX).unwrap();
        assert!(programs.allow.len() < 4096, "{}", programs.allow.len());
    }
}
