//! One incarnation's sandbox, from the inside: what happens between the spawner's fork and the domain's first instruction.
//!
//! The helper (still host root) makes detached copies of what is bound in, joins the domain's cgroup and its kept user and
//! network namespaces and clones the domain's process into new pid, mount, ipc and uts namespaces. That process builds its
//! root file system, gives up everything it does not need, and executes the program by its descriptor.

use std::ffi::CString;
use std::io::{self, PipeWriter, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};

use super::proto::{BindSpec, SpawnRequest};
use super::seccomp::{Filters, PROGRAM_FD};
use crate::sys::{self, MountLimits};

/// Soft and hard limit of open files in a domain.
const NOFILE: rlim_t = 16384;
/// Locked memory: io_uring's registered buffers and a journal's pages.
const MEMLOCK: rlim_t = 1 << 30;
/// Highest capability number to drop; the kernel refuses those it does not know.
const CAP_LAST: u8 = 63;

/// Descriptors from this number on are out of the way of those that are placed for the program.
const ABOVE_PLACED: i32 = 64;

struct Bind {
    mount: OwnedFd,
    target: CString,
    is_dir: bool,
    read_only: bool,
    executable: bool,
}

/// A sandbox whose host-side parts are made.
pub struct Prepared<'a> {
    request: &'a SpawnRequest,
    fds: Vec<OwnedFd>,
    binds: Vec<Bind>,
    args: Vec<CString>,
    env: Vec<CString>,
    filters: &'a Filters,
    null: OwnedFd,
    /// What this host could not give, in words.
    pub missing: Vec<String>,
}

/// What went wrong, with the step's name.
type StepResult<T> = Result<T, String>;

fn step<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> StepResult<T> {
    result.map_err(|e| format!("{what}: {e}"))
}

fn c_strings<'s>(list: impl IntoIterator<Item = &'s String>) -> StepResult<Vec<CString>> {
    list.into_iter().map(|s| step("argument", CString::new(s.as_str()))).collect()
}

/// A host without udev keeps device nodes such as /dev/net/tun to root. The domain, to which dom0 gave the device, then gets a
/// node of its own, in a file system that nobody else sees and that takes the place of the node's directory.
fn own_node(bind: &BindSpec, meta: &std::fs::Metadata) -> io::Result<Bind> {
    use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, mknodat};
    let target = Path::new(&bind.target);
    let (Some(dir), Some(name)) = (target.parent(), target.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mount = sys::detached_fs(c"tmpfs")?;
    let mode = Mode::from_bits_truncate(0o666);
    mknodat(&mount, name, SFlag::S_IFCHR, mode, meta.rdev())?;
    fchmodat(&mount, name, mode, FchmodatFlags::FollowSymlink)?;
    sys::limit_mount(mount.as_fd(), MountLimits { read_only: true, no_dev: false })?;
    let target = CString::new(dir.to_str().unwrap_or_default())?;
    Ok(Bind { mount, target, is_dir: true, read_only: bind.read_only, executable: false })
}

/// True for an absolute path without "..", and not "/" itself.
pub fn is_plain_absolute(path: &str) -> bool {
    let mut parts = Path::new(path).components();
    parts.next() == Some(Component::RootDir)
        && parts.clone().next().is_some()
        && parts.all(|p| matches!(p, Component::Normal(_)))
}

impl<'a> Prepared<'a> {
    /// Makes the detached mounts. Runs in the spawner itself, so that their failures are plain errors.
    ///
    /// # Errors
    /// In one line.
    pub fn new(request: &'a SpawnRequest, fds: Vec<OwnedFd>, filters: &'a Filters) -> StepResult<Self> {
        let wanted = if request.control_stream { 7 } else { 6 };
        if fds.len() != wanted {
            return Err(format!("spawner got {} descriptors for {wanted}", fds.len()));
        }
        let mut missing = Vec::new();
        let mut binds = Vec::new();
        for bind in &request.binds {
            if !is_plain_absolute(&bind.target) {
                return Err(format!("bind target {:?} is not a plain absolute path", bind.target));
            }
            let what = format!("bind {:?}", bind.source);
            let meta = step(&what, std::fs::metadata(&bind.source))?;
            let source = step(&what, CString::new(bind.source.as_str()))?;
            let mount = step(&what, sys::open_tree(&source))?;
            use std::os::unix::fs::FileTypeExt;
            let kind = meta.file_type();
            let is_device = kind.is_char_device() || kind.is_block_device();
            if kind.is_char_device() && meta.mode() & 0o006 != 0o006 {
                binds.push(step(&what, own_node(bind, &meta))?);
                continue;
            }
            let limits = MountLimits { read_only: bind.read_only, no_dev: !is_device };
            step(&what, sys::limit_mount(mount.as_fd(), limits))?;
            // Device nodes keep their owner: their modes are the host's statement. So do /proc's files, which the kernel judges by the
            // namespaces of who asks. Everything else appears as root's own.
            let judged_elsewhere = is_device || Path::new(&bind.source).starts_with("/proc");
            if !judged_elsewhere && let Err(e) = sys::idmap_mount(mount.as_fd(), fds[4].as_fd()) {
                missing.push(format!(
                    "id-mapped mount of {} ({e}): its files belong to nobody inside {}",
                    bind.source, request.name
                ));
            }
            let target = step(&what, CString::new(bind.target.as_str()))?;
            let BindSpec { read_only, executable, .. } = *bind;
            binds.push(Bind { mount, target, is_dir: meta.is_dir(), read_only, executable });
        }
        // A parent must be attached before what lies inside it.
        binds.sort_by(|a, b| a.target.cmp(&b.target));
        let null = step("/dev/null", std::fs::File::open("/dev/null"))?.into();
        let args = c_strings(std::iter::once(&request.name).chain(&request.args))?;
        let env = c_strings(&request.env)?;
        if !request.cgroup.dir.is_empty() {
            step("cgroup", make_cgroup(request))?;
        }
        Ok(Prepared { request, fds, binds, args, env, filters, null, missing })
    }

    /// Runs in the spawner's forked child. Writes the domain's pid, or an error after four zero bytes, and ends.
    pub fn run_helper(&mut self, pipe: PipeWriter) -> ! {
        // Above the numbers that the domain's descriptors will take.
        let Ok(moved) = sys::dup_above(pipe.as_fd(), ABOVE_PLACED) else { sys::exit_now(1) };
        drop(pipe);
        let mut pipe = PipeWriter::from(moved);
        if let Err(reason) = self.helper(&mut pipe) {
            let _nobody_else_to_tell = pipe.write_all(&[0; 4]);
            let _nobody_else_to_tell = pipe.write_all(reason.as_bytes());
        }
        sys::exit_now(0)
    }

    fn helper(&mut self, pipe: &mut PipeWriter) -> StepResult<()> {
        let cgroup = &self.request.cgroup;
        if !cgroup.dir.is_empty() {
            step("cgroup.procs", std::fs::write(format!("{}/cgroup.procs", cgroup.dir), "0"))?;
        }
        step("limits", set_limits(cgroup.pids))?;
        step("setsid", nix::unistd::setsid())?;
        step("user namespace", setns(self.fds[4].as_fd(), CloneFlags::CLONE_NEWUSER))?;
        step("network namespace", setns(self.fds[5].as_fd(), CloneFlags::CLONE_NEWNET))?;
        let flags = libc::CLONE_PARENT
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWNS
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS;
        // The pid must be in the pipe before anything the child says: the child waits for this second pipe to close.
        let (mut gate, opener) = step("pipe", io::pipe())?;
        match step("clone", sys::fork_with(flags))? {
            Some(pid) => {
                let told = pipe.write_all(&pid.to_ne_bytes());
                drop(opener);
                step("telling the pid", told)
            }
            None => {
                drop(opener);
                let _until_closed = io::Read::read(&mut gate, &mut [0]);
                drop(gate);
                let reason = match self.become_domain() {
                    Ok(never) => match never {},
                    Err(reason) => reason,
                };
                let _nobody_else_to_tell = pipe.write_all(reason.as_bytes());
                sys::exit_now(127)
            }
        }
    }

    /// The domain's process. The status pipe is close-on-exec, so success shows as its end.
    fn become_domain(&mut self) -> StepResult<std::convert::Infallible> {
        step("setgroups", nix::unistd::setgroups(&[]))?;
        let (uid, gid) = (nix::unistd::Uid::from_raw(0), nix::unistd::Gid::from_raw(0));
        step("setgid", nix::unistd::setresgid(gid, gid, gid))?;
        step("setuid", nix::unistd::setresuid(uid, uid, uid))?;
        step("host name", nix::unistd::sethostname(&self.request.name))?;
        self.build_root()?;
        for cap in 0..=CAP_LAST {
            if !self.request.capabilities.contains(&cap)
                && let Err(e) = sys::prctl(libc::PR_CAPBSET_DROP, cap.into())
                && e.raw_os_error() != Some(libc::EINVAL)
            {
                return Err(format!("capability {cap}: {e}"));
            }
        }
        nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
        step("no_new_privs", sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1))?;
        if self.request.die_with_hypervisor {
            step("pdeathsig", sys::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as u64))?;
        }
        self.landlock()?;
        if self.request.capabilities.is_empty() {
            // The file of the program is still readable by its descriptor; nothing below needs a capability.
            step("capabilities", sys::drop_thread_caps())?;
        }
        let program = self.place_fds()?;
        sys::reset_signals();
        step("seccomp", self.filters.apply(self.request.seccomp))?;
        Err(format!("executing the program: {}", sys::exec_fd(program, &self.args, &self.env)))
    }

    fn build_root(&self) -> StepResult<()> {
        let none: Option<&str> = None;
        step("private mounts", mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))?;
        let over = ["/tmp", "/run", "/proc"].into_iter().find(|p| Path::new(p).is_dir());
        let over = over.ok_or("the host has neither /tmp nor /run")?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        step(
            "root file system",
            mount(Some("root"), over, Some("tmpfs"), flags, Some("size=64k,nr_inodes=1k,mode=755")),
        )?;
        step("chdir", nix::unistd::chdir(over))?;
        for bind in &self.binds {
            let target = bind.target.to_str().unwrap_or_default().trim_start_matches('/').to_owned();
            let path = Path::new(&target);
            let dir = if bind.is_dir { Some(path) } else { path.parent() };
            let what = format!("bind target /{target}");
            if let Some(dir) = dir {
                step(&what, std::fs::create_dir_all(dir))?;
            }
            if !bind.is_dir && !path.exists() {
                step(&what, std::fs::File::create(path).map(drop))?;
            }
            let target = step(&what, CString::new(target.as_str()))?;
            step(&what, sys::attach_mount(bind.mount.as_fd(), &target))?;
        }
        if nix::unistd::pivot_root(".", ".").is_ok() {
            step("old root", umount2(".", MntFlags::MNT_DETACH))?;
        } else {
            // A host that runs from its initramfs has a root that cannot be pivoted away; it is covered instead.
            step("moving the root", mount(Some("."), "/", none, MsFlags::MS_MOVE, none))?;
            step("chroot", nix::unistd::chroot("."))?;
        }
        step("chdir", nix::unistd::chdir("/"))?;
        let read_only = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        step("read-only root", mount(none, "/", none, read_only, none))
    }

    /// A second belt beside the empty root: nothing outside the binds, no abstract sockets, no signals to others. What the
    /// kernel lacks is left out; hv-core reports its Landlock version.
    fn landlock(&self) -> StepResult<()> {
        let abi = ABI::V6;
        let all = AccessFs::from_all(abi);
        let build = || -> Result<(), Box<dyn std::error::Error>> {
            let mut rules = Ruleset::default()
                .set_compatibility(CompatLevel::BestEffort)
                .handle_access(all)?
                .scope(Scope::from_all(abi))?
                .create()?;
            let of_files: BitFlags<AccessFs> = AccessFs::from_file(abi);
            rules = rules
                .add_rule(PathBeneath::new(self.fds[0].as_fd(), AccessFs::Execute | AccessFs::ReadFile))?;
            // Looking at the (empty, read-only) root is harmless.
            rules = rules.add_rule(PathBeneath::new(PathFd::new("/")?, AccessFs::ReadDir))?;
            for bind in &self.binds {
                let mut allowed = if bind.read_only { AccessFs::from_read(abi) } else { all };
                if !bind.executable {
                    allowed.remove(AccessFs::Execute);
                }
                if bind.read_only {
                    // A read-only bind of a device still takes ioctls.
                    allowed |= AccessFs::IoctlDev;
                }
                if !bind.is_dir {
                    allowed &= of_files;
                }
                let path = PathFd::new(bind.target.to_str().unwrap_or_default())?;
                rules = rules.add_rule(PathBeneath::new(path, allowed))?;
            }
            rules.restrict_self()?;
            Ok(())
        };
        step("landlock", build())
    }

    /// Puts the descriptors where the ABI has them; returns the program's.
    fn place_fds(&self) -> StepResult<BorrowedFd<'_>> {
        // First everything above the target range, so that no dup2 hits one that is still needed.
        let high = |fd: &OwnedFd| step("descriptors", sys::dup_above(fd.as_fd(), ABOVE_PLACED));
        let mut placed = vec![
            (high(&self.null)?, 0),
            (high(&self.fds[3])?, 1),
            (high(&self.fds[3])?, 2),
            (high(&self.fds[1])?, hv_abi::HYPERCALL_FD),
            (high(&self.fds[2])?, hv_abi::CONTROL_LISTENER_FD),
        ];
        let program = high(&self.fds[0])?;
        if let Some(stream) = self.fds.get(6) {
            placed.push((high(stream)?, hv_abi::HVCORE_CONTROL_FD));
        }
        let first_free = placed.len() as u32;
        step("descriptors", sys::cloexec_from(first_free))?;
        for (fd, number) in placed {
            step("descriptors", sys::dup_to(fd.as_fd(), number))?;
            std::mem::forget(fd); // close-on-exec; closing it here could hit a number just placed
        }
        step("descriptors", sys::dup_to(program.as_fd(), PROGRAM_FD))?;
        step("descriptors", sys::cloexec_from(PROGRAM_FD as u32))?;
        std::mem::forget(program);
        Ok(self.program_fd())
    }

    fn program_fd(&self) -> BorrowedFd<'_> {
        // The number was just placed; the owned descriptors of `self` are never dropped before exec.
        sys::borrow(PROGRAM_FD)
    }
}

fn set_limits(pids: u32) -> nix::Result<()> {
    // Also where there is no cgroup, tasks are bounded: they are counted for the domain's own uid.
    let limits = [
        (Resource::RLIMIT_NOFILE, NOFILE),
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_MEMLOCK, MEMLOCK),
        (Resource::RLIMIT_NPROC, pids.into()),
    ];
    for (resource, limit) in limits {
        if setrlimit(resource, limit, limit).is_err() {
            // A container's root may not raise its own limits.
            let (_, hard) = getrlimit(resource)?;
            setrlimit(resource, limit.min(hard), limit.min(hard))?;
        }
    }
    Ok(())
}

fn make_cgroup(request: &SpawnRequest) -> io::Result<()> {
    let cgroup = &request.cgroup;
    let dir = Path::new(&cgroup.dir);
    match std::fs::create_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let max = if cgroup.memory_bytes == 0 { "max".into() } else { cgroup.memory_bytes.to_string() };
    std::fs::write(dir.join("memory.max"), max)?;
    std::fs::write(dir.join("pids.max"), cgroup.pids.to_string())?;
    if cgroup.cpu_weight != 0 {
        std::fs::write(dir.join("cpu.weight"), cgroup.cpu_weight.to_string())?;
    }
    Ok(())
}

impl std::fmt::Debug for Prepared<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prepared").field("request", self.request).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::is_plain_absolute;

    #[test]
    fn targets_stay_inside() {
        assert!(is_plain_absolute("/a/b"));
        for bad in ["", "a", "/", "/a/../b", "..", "//.."] {
            assert!(!is_plain_absolute(bad), "{bad:?}");
        }
    }
}
