"""Tries KVM for real: makes a virtual machine of one processor and runs a few instructions in it.

A `/dev/kvm` that exists is no proof: nested and software implementations offer one that cannot run a guest. A pass here
means that KVM executes real-mode code; a whole guest kernel asks more, and only booting one shows that.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import struct
import subprocess
import sys

# include/uapi/linux/kvm.h
KVM_GET_API_VERSION = 0xAE00
KVM_CREATE_VM = 0xAE01
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_RUN = 0xAE80
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS, KVM_SET_SREGS = 0x8138AE83, 0x4138AE84
SREGS_BYTES = 312
EXIT_IO, EXIT_HLT = 2, 5
API_VERSION = 12

# mov dx, 0x3f8; add al, bl; out dx, al; hlt
CODE = bytes.fromhex("baf80300d8eef4")
LOAD_ADDRESS = 0x1000
MEMORY_BYTES = 0x2000
DEADLINE_SECONDS = 10


class KvmUnusable(Exception):
    """KVM cannot run code here; the message says how it failed."""


def probe(seconds: float = DEADLINE_SECONDS) -> None:
    """Run the guest code in a process of its own, which is killed when KVM hangs.

    Raises:
        KvmUnusable
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "emberbox.cli.kvm"], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise KvmUnusable(f"a guest of four instructions did not end within {seconds:g} s") from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"the probe ended with code {done.returncode}"]
        raise KvmUnusable(last[0])


def run_guest() -> None:
    """Add 2 and 3 in a virtual machine and see 5 come out of its serial port, then HLT.

    Raises:
        KvmUnusable
    """
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise KvmUnusable("/dev/kvm does not exist") from None
    except OSError as error:
        raise KvmUnusable(f"/dev/kvm cannot be opened: {error.strerror}") from None
    try:
        version = fcntl.ioctl(kvm, KVM_GET_API_VERSION, 0)
        if version != API_VERSION:
            raise KvmUnusable(f"KVM speaks API version {version}, not {API_VERSION}")
        vm = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        if platform.machine() == "x86_64":
            _run_x86(kvm, vm)
    except OSError as error:
        raise KvmUnusable(f"a KVM call failed: {error.strerror}") from None


def _run_x86(kvm: int, vm: int) -> None:
    memory = mmap.mmap(-1, MEMORY_BYTES)
    memory[: len(CODE)] = CODE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, KVM_SET_USER_MEMORY_REGION, struct.pack("IIQQQ", 0, 0, LOAD_ADDRESS, MEMORY_BYTES, address))
    vcpu = fcntl.ioctl(vm, KVM_CREATE_VCPU, 0)
    run = mmap.mmap(vcpu, fcntl.ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0))

    special = bytearray(SREGS_BYTES)
    fcntl.ioctl(vcpu, KVM_GET_SREGS, special)
    # struct kvm_segment cs comes first: base u64, limit u32, selector u16
    struct.pack_into("<Q", special, 0, 0)
    struct.pack_into("<H", special, 12, 0)
    fcntl.ioctl(vcpu, KVM_SET_SREGS, bytes(special))
    # rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8-r15, rip, rflags (bit 1 is always set)
    fcntl.ioctl(vcpu, KVM_SET_REGS, struct.pack("18Q", 2, 3, *[0] * 14, LOAD_ADDRESS, 2))

    fcntl.ioctl(vcpu, KVM_RUN, 0)
    reason = struct.unpack_from("<I", run, 8)[0]
    if reason != EXIT_IO:
        raise KvmUnusable(f"the guest stopped with exit reason {reason} instead of port output ({EXIT_IO})")
    # struct kvm_run.io at 32: direction u8, size u8, port u16, count u32, data_offset u64
    offset = struct.unpack_from("<Q", run, 40)[0]
    if run[offset] != 5:
        raise KvmUnusable(f"the guest added 2 and 3 to {run[offset]}")
    fcntl.ioctl(vcpu, KVM_RUN, 0)
    reason = struct.unpack_from("<I", run, 8)[0]
    if reason != EXIT_HLT:
        raise KvmUnusable(f"the guest stopped with exit reason {reason} instead of HLT ({EXIT_HLT})")


if __name__ == "__main__":
    try:
        run_guest()
    except KvmUnusable as unusable:
        sys.exit(str(unusable))
