"""The system calls of a container: an allow-list, as OCI's `linux.seccomp`.

Three answers: what programs need is allowed; what only the owner of a kernel may do is `EPERM`, as for any
unprivileged user; the rest, and what the kernel will grow, does not exist (`ENOSYS`), which is the answer that
programs know how to fall back from. Only the machine's own architecture can be called at all.

Left out of what containers usually allow, because of what they have cost kernels: user namespaces, io_uring,
userfaultfd, bpf, perf, keyrings, AF_ALG, AF_VSOCK, AF_PACKET and every netlink family but those that `ip`, `ss`,
`sudo` and libc read.
"""

from __future__ import annotations

import errno
import platform
from functools import lru_cache
from typing import Any

_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}


def _words(text: str) -> list[str]:
    return text.split()


_ALLOWED = _words("""
accept accept4 access alarm arch_prctl bind brk cachestat capget capset chdir chmod chown chroot clock_getres
clock_gettime clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1
epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2
fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fork
fremovexattr fsetxattr fstat fstatfs fsync ftruncate futex futex_requeue futex_wait futex_waitv futex_wake futimesat
get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid geteuid getgid getgroups getitimer
getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid getrlimit getrusage getsid
getsockname getsockopt gettid gettimeofday getuid getxattr inotify_add_watch inotify_init inotify_init1
inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents io_setup io_submit ioctl ioprio_get ioprio_set kill
landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lgetxattr link linkat listen listxattr
llistxattr lremovexattr lseek lsetxattr lstat madvise map_shadow_stack membarrier memfd_create mincore mkdir mkdirat
mknod mknodat mlock mlock2 mlockall mmap mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend
mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep
newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll
ppoll prctl pread64 preadv preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6 ptrace
pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages
removexattr rename renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask
rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max
sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop
semtimedop sendfile sendmmsg sendmsg sendto set_robust_list set_thread_area set_tid_address setfsgid setfsuid setgid
setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid setsockopt setuid
setxattr shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 splice stat statfs statx symlink symlinkat
sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime
timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask uname unlink unlinkat utime
utimensat utimes vfork vmsplice wait4 waitid write writev
""")

_OWNERS_ONLY = _words("""
acct add_key bpf clock_adjtime clock_settime delete_module fanotify_init fsconfig fsmount fsopen fspick finit_module
get_mempolicy init_module io_uring_enter io_uring_register io_uring_setup iopl ioperm kcmp kexec_file_load kexec_load
keyctl lookup_dcookie mbind migrate_pages mount mount_setattr move_mount move_pages open_by_handle_at open_tree
perf_event_open pidfd_getfd pivot_root quotactl quotactl_fd reboot request_key set_mempolicy set_mempolicy_home_node
setdomainname sethostname setns settimeofday swapoff swapon syslog umount2 userfaultfd vhangup
""")

_CLONE_NEW = 0x7E020000
"""Every CLONE_NEW* flag of clone(2) and unshare(2); NEWTIME (0x80) is part of clone's exit signal."""
_UNSHARE_NEW = _CLONE_NEW | 0x80

_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
# Not KOBJECT_UEVENT: the slot's namespace is the host's, and gets the events of the host's devices.
_NETLINK_ROUTE, _NETLINK_SOCK_DIAG, _NETLINK_AUDIT = 0, 4, 9

# personality(2): Linux, with and without ADDR_NO_RANDOMIZE (debuggers) and UNAME26, and the question what it is.
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0x40000, 0xFFFFFFFF)


@lru_cache(maxsize=1)
def profile() -> dict[str, Any]:
    """The profile for this machine's architecture; None of it depends on the container."""
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.ENOSYS,
        "architectures": [_ARCHITECTURES[platform.machine()]],
        "syscalls": [
            {"names": _ALLOWED, "action": "SCMP_ACT_ALLOW"},
            _refused(_OWNERS_ONLY, errno.EPERM),
            # glibc falls back to clone(2), whose flags can be read here; those of clone3 are in memory.
            _refused(["clone3"], errno.ENOSYS),
            _allowed("clone", _masked(0, _CLONE_NEW)),
            _allowed("unshare", _masked(0, _UNSHARE_NEW)),
            *(_allowed("socket", _equal(0, family)) for family in (_AF_UNIX, _AF_INET, _AF_INET6)),
            *(
                _allowed("socket", _equal(0, _AF_NETLINK), _equal(2, protocol))
                for protocol in (_NETLINK_ROUTE, _NETLINK_SOCK_DIAG, _NETLINK_AUDIT)
            ),
            _allowed("socketpair", _equal(0, _AF_UNIX)),
            *(_allowed("personality", _equal(0, value)) for value in _PERSONALITIES),
        ],
    }


def _allowed(name: str, *conditions: dict[str, Any]) -> dict[str, Any]:
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": list(conditions)}


def _refused(names: list[str], number: int) -> dict[str, Any]:
    return {"names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": number}


def _equal(index: int, value: int) -> dict[str, Any]:
    return {"index": index, "value": value, "op": "SCMP_CMP_EQ"}


def _masked(index: int, mask: int) -> dict[str, Any]:
    """None of the bits of `mask` is set."""
    return {"index": index, "value": mask, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}
