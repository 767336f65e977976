//! System-call filters: an allow-list for each kind of process. Anything else kills the process.
//!
//! Three filters are stacked and the stricter answer wins: the first turns clone3 into `ENOSYS`, so that libc falls back to
//! clone, whose flags a filter can see; the second keeps non-blocking descriptors so; the last is the allow-list, in which clone
//! makes threads only. io_uring's own operations pass no filter; namespaces and Landlock bound what they can reach.

use std::collections::BTreeMap;

use libc::{c_long, c_ulong};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Cmp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::proto::SeccompProfile;

/// The program's descriptor while it is executed.
pub const PROGRAM_FD: i32 = 6;

/// Allowed whatever their arguments.
const SERVICE: &[c_long] = &[
    // Data.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_copy_file_range,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_truncate,
    // Files.
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_stat,
    libc::SYS_fstat,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_access,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getdents64,
    libc::SYS_getcwd,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_chmod,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_umask,
    libc::SYS_flock,
    libc::SYS_fcntl, // Its F_SETFL by `keep_nonblocking` too.
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_pipe,
    libc::SYS_pipe2,
    // Memory.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_msync,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_memfd_create,
    // Waiting.
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_select,
    libc::SYS_pselect6,
    libc::SYS_epoll_create,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_signalfd4,
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_sched_yield,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Sockets that are there.
    libc::SYS_connect,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // Threads, signals, the process itself.
    libc::SYS_clone3,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_rseq,
    libc::SYS_membarrier,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_getcpu,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigsuspend,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_restart_syscall,
    libc::SYS_arch_prctl,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrlimit,
    libc::SYS_getrusage,
    libc::SYS_times,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getrandom,
    libc::SYS_gettimeofday,
    libc::SYS_time,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

const TOOLSTACK_MORE: &[c_long] = &[
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_utimensat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_syncfs,
];

const RUNNER_MORE: &[c_long] = &[
    libc::SYS_timer_create,
    libc::SYS_timer_settime,
    libc::SYS_timer_delete,
    libc::SYS_timer_getoverrun,
    libc::SYS_process_madvise,
];

/// What a device model wants beyond the runner's: filters of its own (`-sandbox on`), its limits, and old names of calls.
const QEMU_MORE: &[c_long] = &[
    libc::SYS_seccomp,
    libc::SYS_get_mempolicy,
    libc::SYS_set_mempolicy,
    libc::SYS_mbind,
    libc::SYS_chdir,
    libc::SYS_fchdir,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_getpgrp,
    libc::SYS_getpgid,
    libc::SYS_eventfd,
    libc::SYS_sched_get_priority_min,
    libc::SYS_sched_get_priority_max,
];

/// ioctls of every service: non-blocking mode, bytes to read, terminal queries, disk sizes and discards.
const IOCTLS: &[c_ulong] = &[
    0x5421,
    0x541b,
    0x5401,
    0x5413, // FIONBIO FIONREAD TCGETS TIOCGWINSZ
    0x5451, // FIOCLEX
    0x8008_1272,
    0x1268,
    0x127b,
    0x127a,
    0x1278,
    0x1279,
    0x127e,
    0x1260, // BLKGETSIZE64 SSZ PBSZ ALIGN IOMIN IOOPT ROTATIONAL GETSIZE
    0x1277,
    0x127f,
    0x127d,
    0x1261,
    0x125e,      // BLKDISCARD ZEROOUT SECDISCARD FLSBUF ROGET
    0x4004_9409, // FICLONE
];

/// ioctls of a network driver domain, on top.
const NET_IOCTLS: &[c_ulong] = &[
    0x4004_54ca,
    0x8004_54d2,
    0x8004_54cf,
    0x4004_54d0, // TUNSETIFF GETIFF GETFEATURES SETOFFLOAD
    0x4004_54d8,
    0x4004_54dc,
    0x4004_54de,
    0x8004_54d7, // TUNSETVNETHDRSZ VNETLE VNETBE GETVNETHDRSZ
    0x4004_54cb,
    0x4004_54d9,
    0x4004_54d4,
    0x4004_54e2,
    0x4004_54c8, // TUNSETPERSIST QUEUE SNDBUF CARRIER NOCSUM
    0x8910,
    0x8913,
    0x8914,
    0x8915,
    0x8916,
    0x891b,
    0x891c, // SIOCGIFNAME G/SIFFLAGS G/SIFADDR G/SIFNETMASK
    0x8921,
    0x8922,
    0x8924,
    0x8927,
    0x8933,
    0x8942,
    0x8943, // SIOCGIFMTU SIFMTU SIFHWADDR GIFHWADDR GIFINDEX G/SIFTXQLEN
    0x8946,
    0x89a0,
    0x89a1,
    0x89a2,
    0x89a3,
    0x8970, // SIOCETHTOOL BRADDBR BRDELBR BRADDIF BRDELIF GIFMAP
    0x890b,
    0x890c, // SIOCADDRT DELRT
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn rule(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, seccompiler::BackendError> {
    SeccompRule::new(conditions)
}

fn equals(arg: u8, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(arg, Len::Dword, Cmp::Eq, value)
}

fn rules(profile: SeccompProfile) -> Result<Rules, seccompiler::BackendError> {
    let mut rules = Rules::new();
    let more: &[c_long] = match profile {
        SeccompProfile::Toolstack => TOOLSTACK_MORE,
        SeccompProfile::Runner | SeccompProfile::Qemu => RUNNER_MORE,
        SeccompProfile::Service | SeccompProfile::Net => &[],
    };
    let qemu = if profile == SeccompProfile::Qemu { QEMU_MORE } else { &[] };
    for number in SERVICE.iter().chain(more).chain(qemu) {
        rules.insert(*number, Vec::new());
    }
    let threads = libc::CLONE_THREAD as u64 | libc::CLONE_VM as u64;
    let only_threads = SeccompCondition::new(0, Len::Dword, Cmp::MaskedEq(threads), threads)?;
    rules.insert(libc::SYS_clone, vec![rule(vec![only_threads])?]);
    // The program itself, and nothing else by this call.
    let program = vec![equals(0, PROGRAM_FD as u64)?, equals(4, libc::AT_EMPTY_PATH as u64)?];
    rules.insert(libc::SYS_execveat, vec![rule(program)?]);
    // Own limits may be read, and lowered; raising needs a capability that is not there.
    rules.insert(libc::SYS_prlimit64, vec![rule(vec![equals(0, 0)?])?]);
    let names =
        [libc::PR_SET_NAME, libc::PR_GET_NAME, 0x5356_4d41 /* PR_SET_VMA */, libc::PR_GET_DUMPABLE];
    let mut names = names.to_vec();
    if profile == SeccompProfile::Qemu {
        names.extend([libc::PR_SET_SECCOMP, libc::PR_GET_SECCOMP, libc::PR_SET_NO_NEW_PRIVS]);
        names.extend([libc::PR_CAPBSET_READ, libc::PR_SET_TIMERSLACK, libc::PR_MCE_KILL]);
    }
    let names = names.iter().map(|&n| rule(vec![equals(0, n as u64)?])).collect::<Result<_, _>>()?;
    rules.insert(libc::SYS_prctl, names);
    // The process is alone in its pid namespace, so this can only reach itself.
    rules.insert(libc::SYS_kill, vec![rule(vec![equals(0, 1)?])?]);

    let mut families = vec![libc::AF_UNIX];
    if profile == SeccompProfile::Net {
        families.extend([libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET]);
    }
    let families = families.iter().map(|&f| rule(vec![equals(0, f as u64)?])).collect::<Result<_, _>>()?;
    rules.insert(libc::SYS_socket, families);
    rules.insert(libc::SYS_socketpair, vec![rule(vec![equals(0, libc::AF_UNIX as u64)?])?]);

    let mut ioctls = IOCTLS.to_vec();
    if profile == SeccompProfile::Net {
        ioctls.extend(NET_IOCTLS);
    }
    let mut ioctls = ioctls.iter().map(|&i| rule(vec![equals(1, i)?])).collect::<Result<Vec<_>, _>>()?;
    if matches!(profile, SeccompProfile::Runner | SeccompProfile::Qemu) {
        // KVM's ioctls all have this type byte (linux/kvm.h, KVMIO).
        const KVMIO: u64 = 0xae;
        ioctls.push(rule(vec![SeccompCondition::new(1, Len::Dword, Cmp::MaskedEq(0xff00), KVMIO << 8)?])?);
    }
    rules.insert(libc::SYS_ioctl, ioctls);
    Ok(rules)
}

/// The two ends of an event channel share one open file, flags included. A domain that could clear `O_NONBLOCK` of it and fill the
/// counter would make the other's next write wait for ever; so that flag is never cleared, by either of the calls that can. Flags with
/// `O_DIRECT` are let pass: files need them, and fcntl(2) refuses them, and all others with them, where there is no direct I/O, as of an eventfd.
fn keep_nonblocking() -> Result<Rules, seccompiler::BackendError> {
    let keeps = (libc::O_NONBLOCK | libc::O_DIRECT) as u64;
    let clears = SeccompCondition::new(2, Len::Dword, Cmp::MaskedEq(keeps), 0)?;
    Ok(BTreeMap::from([
        (libc::SYS_fcntl, vec![rule(vec![equals(1, libc::F_SETFL as u64)?, clears])?]),
        (libc::SYS_ioctl, vec![rule(vec![equals(1, libc::FIONBIO)?])?]),
    ]))
}

fn compile(filter: SeccompFilter) -> Result<BpfProgram, seccompiler::BackendError> {
    filter.try_into()
}

/// The compiled filters.
#[derive(Debug)]
pub struct Filters {
    no_clone3: BpfProgram,
    keep_nonblocking: BpfProgram,
    profiles: [(SeccompProfile, BpfProgram); 5],
}

impl Filters {
    /// Compiles all profiles.
    ///
    /// # Errors
    /// Only if a list here is wrong.
    pub fn compile() -> Result<Filters, seccompiler::BackendError> {
        let arch = TargetArch::x86_64;
        let no_clone3 = compile(SeccompFilter::new(
            BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
            SeccompAction::Allow,
            SeccompAction::Errno(libc::ENOSYS as u32),
            arch,
        )?)?;
        let keep_nonblocking = compile(SeccompFilter::new(
            keep_nonblocking()?,
            SeccompAction::Allow,
            SeccompAction::Errno(libc::EPERM as u32),
            arch,
        )?)?;
        let profile = |p| -> Result<_, seccompiler::BackendError> {
            // QEMU tries calls that differ between its versions, and goes on without them; its own filters kill.
            let refused = match p {
                SeccompProfile::Qemu => SeccompAction::Errno(libc::EPERM as u32),
                _ => SeccompAction::KillProcess,
            };
            let filter = SeccompFilter::new(rules(p)?, refused, SeccompAction::Allow, arch)?;
            Ok((p, compile(filter)?))
        };
        Ok(Filters {
            no_clone3,
            keep_nonblocking,
            profiles: [
                profile(SeccompProfile::Service)?,
                profile(SeccompProfile::Net)?,
                profile(SeccompProfile::Runner)?,
                profile(SeccompProfile::Toolstack)?,
                profile(SeccompProfile::Qemu)?,
            ],
        })
    }

    /// Puts the calling process under a profile, for ever.
    ///
    /// # Errors
    /// As seccomp(2).
    pub fn apply(&self, profile: SeccompProfile) -> Result<(), seccompiler::Error> {
        let list = self.profiles.iter().find(|(p, _)| *p == profile).map(|(_, list)| list);
        // Every profile is in the array; an empty program is refused by seccompiler, never applied as "no filter".
        // The allow-list comes last: it has no call to add another filter.
        // QEMU makes its sockets block for a while, and has no event channels.
        let keep = profile != SeccompProfile::Qemu;
        seccompiler::apply_filter(&self.no_clone3)
            .and_then(|()| if keep { seccompiler::apply_filter(&self.keep_nonblocking) } else { Ok(()) })
            .and_then(|()| seccompiler::apply_filter(list.map_or(&[][..], Vec::as_slice)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_compiles_within_the_kernels_limit() {
        for (profile, program) in &Filters::compile().unwrap().profiles {
            assert!(program.len() < 4096, "{profile:?}: {} instructions", program.len());
        }
    }

    #[test]
    fn no_profile_lets_a_process_look_at_others_or_change_mounts() {
        for profile in [
            SeccompProfile::Service,
            SeccompProfile::Net,
            SeccompProfile::Runner,
            SeccompProfile::Toolstack,
            SeccompProfile::Qemu,
        ] {
            let rules = rules(profile).unwrap();
            for forbidden in [
                libc::SYS_ptrace,
                libc::SYS_process_vm_readv,
                libc::SYS_process_vm_writev,
                libc::SYS_mount,
                libc::SYS_move_mount,
                libc::SYS_setns,
                libc::SYS_unshare,
                libc::SYS_bpf,
                libc::SYS_keyctl,
                libc::SYS_userfaultfd,
                libc::SYS_execve,
                libc::SYS_fork,
                libc::SYS_vfork,
                libc::SYS_pidfd_getfd,
                libc::SYS_perf_event_open,
            ] {
                assert!(!rules.contains_key(&forbidden), "{profile:?} allows {forbidden}");
            }
        }
    }
}
