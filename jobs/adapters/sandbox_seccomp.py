"""seccomp: this process may no longer ask the kernel for what no parser needs: network, other programs, other processes, settings of
the system. Refused calls fail with EPERM. See seccomp(2); the filter is a program for the classic Berkeley packet filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

_PR_SET_SECCOMP, _FILTER_MODE = 22, 2
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
"""Where they lie in what the kernel shows of a call."""
_X32 = 0x40000000
_CLONE_THREAD = 0x10000
_PR_SET_PDEATHSIG = 1
_AF_UNIX, _SOCK_STREAM, _SOCKET_TYPE = 1, 1, 0xF

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""What the kernel calls them, and their column below. On others there is no filter."""

_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # network, and what would get around this filter
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202), "accept4": (288, 242),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # other programs and processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "setsid": (112, 157), "setpgid": (109, 154),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "tkill": (200, 130),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "setpriority": (141, 140), "ioprio_set": (251, 30),
    # memory that counts for no process, or outlives it
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180),
    # what Landlock does not see of files
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "lchown": (94, None),
    "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "mknod": (133, None), "mknodat": (259, 33), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    # the system
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "move_mount": (429, 429),
    "open_tree": (428, 428), "mount_setattr": (442, 442), "open_tree_attr": (467, 467), "swapon": (167, 224), "swapoff": (168, 225),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "acct": (163, 89), "fanotify_init": (300, 262),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "syslog": (103, 116), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None),
}  # fmt: skip
"""System calls by their numbers on x86_64 and aarch64; None where there is no such call."""
_CLONE, _CLONE3, _PRCTL, _PRLIMIT, _SOCKETPAIR = (56, 220), (435, 435), (157, 167), (302, 261), (53, 199)
_SIGNALLING = ((62, 129), (234, 131), (129, 138), (297, 240))  # kill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo


def restrict() -> None:
    """Set the filter for this thread and those it will start. Raises OSError where the kernel cannot do it, or knows no such machine.

    Needs PR_SET_NO_NEW_PRIVS. There is no way back.
    """
    if platform.machine() not in ARCHITECTURES:
        raise OSError(f"there is no filter for {platform.machine()} machines")
    program = assemble(*ARCHITECTURES[platform.machine()], os.getpid())
    libc = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(program, len(program))
    handed = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    if libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, handed, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def assemble(architecture: int, column: int, pid: int) -> bytes:
    """Return the filter for a machine and a process, 8 bytes an instruction. Pure."""
    refuse = _op(_RETURN, _REFUSE | errno.EPERM)
    allow = _op(_RETURN, _ALLOW)
    parts = [
        _op(_LOAD, _ARCHITECTURE) + _op(_EQUAL, architecture, 1, 0) + refuse,  # 32-bit programs' calls have other numbers
        _op(_LOAD, _NUMBER) + _op(_AT_LEAST, _X32, 0, 1) + refuse,
        _op(_EQUAL, _CLONE3[column], 0, 1) + _op(_RETURN, _REFUSE | errno.ENOSYS),  # hides its flags; libraries then ask for clone
        # A thread, no process.
        _when(_CLONE[column], _argument(0) + _op(_ANY_BIT, _CLONE_THREAD, 0, 1) + allow + refuse),
        # asyncio wakes itself up by a pair of sockets.
        _when(
            _SOCKETPAIR[column],
            _argument(0) + _op(_EQUAL, _AF_UNIX, 1, 0) + refuse
            + _argument(1) + _op(_AND, _SOCKET_TYPE) + _op(_EQUAL, _SOCK_STREAM, 0, 1) + allow + refuse,
        ),
        # It dies with its parent.
        _when(_PRCTL[column], _argument(0) + _op(_EQUAL, _PR_SET_PDEATHSIG, 0, 1) + refuse + allow),
        # The limits of other processes are not for it to set.
        _when(_PRLIMIT[column], _argument(0) + _op(_EQUAL, 0, 1, 0) + _op(_EQUAL, pid, 0, 1) + allow + refuse),
        # abort() is a signal to oneself.
        *(_when(call[column], _argument(0) + _op(_EQUAL, pid, 0, 1) + allow + refuse) for call in _SIGNALLING),
        *(_op(_EQUAL, numbers[column] or 0, 0, 1) + refuse for numbers in _REFUSED.values() if numbers[column] is not None),
    ]  # fmt: skip
    return b"".join(parts) + allow


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Return one instruction; a jump skips so many of those that follow."""
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _argument(number: int) -> bytes:
    """Load the lower half of an argument; those that are looked at are 32 bits wide."""
    return _op(_LOAD, _FIRST_ARGUMENT + 8 * number)


def _when(call: int, then: bytes) -> bytes:
    """Run instructions, which end in a return, for one system call."""
    return _op(_EQUAL, call, 0, len(then) // 8) + then
