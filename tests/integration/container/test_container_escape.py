"""What a hostile root inside a container tries. Each test does it for real, from inside, through the agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import platform
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.container import Guest, World, needs_root

pytestmark = [needs_root, pytest.mark.asyncio(loop_scope="module")]

# Number, arguments and what it would give, on x86_64. Called raw, so that no library is polite first.
SYSCALLS = {
    "mount": (165, "b'none', b'/mnt', b'tmpfs', 0, None"),
    "umount2": (166, "b'/proc', 2"),
    "pivot_root": (155, "b'/', b'/mnt'"),
    "open_tree": (428, "-100, b'/', 1"),
    "fsopen": (430, "b'tmpfs', 0"),
    "mount_setattr": (442, "-100, b'/', 0, None, 0"),
    "unshare_user": (272, "0x10000000"),
    "unshare_mount": (272, "0x00020000"),
    "clone_user": (56, "0x10000000 | 17, 0, 0, 0, 0"),
    "clone3": (435, "None, 0"),
    "setns": (308, "0, 0"),
    "bpf": (321, "0, None, 0"),
    "userfaultfd": (323, "0"),
    "io_uring_setup": (425, "8, None"),
    "perf_event_open": (298, "None, 0, -1, -1, 0"),
    "keyctl": (250, "0, -3, 1"),
    "add_key": (248, "b'user', b'x', b'y', 1, -3"),
    "request_key": (249, "b'user', b'x', None, -3"),
    "init_module": (175, "None, 0, b''"),
    "finit_module": (313, "0, b'', 0"),
    "kexec_load": (246, "0, 0, None, 0"),
    "reboot": (169, "0xfee1dead, 672274793, 0, None"),
    "swapon": (167, "b'/x', 0"),
    "open_by_handle_at": (304, "0, None, 0"),
    "syslog": (103, "3, None, 0"),
    "clock_settime": (227, "0, None"),
    "settimeofday": (164, "None, None"),
    "sethostname": (170, "b'evil', 4"),
    "iopl": (172, "3"),
    "fanotify_init": (300, "0, 0"),
    "quotactl": (179, "0, None, 0, None"),
    "pidfd_getfd": (438, "0, 0, 0"),
    "acct": (163, "b'/tmp/acct'"),
    "modify_ldt": (154, "0, None, 0"),
    "memfd_secret": (447, "0"),
}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def other(world: World) -> Guest:
    return await world.machine()


async def _python(guest: Guest, code: str, user: str = "root") -> str:
    output = await guest.run(f"python3 - <<'PYTHON'\n{code}\nPYTHON", user=user)
    return output.text


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")
async def test_the_kernel_owners_system_calls_are_refused(guest: Guest) -> None:
    calls = ", ".join(f"{name!r}: ({number}, ({arguments},))" for name, (number, arguments) in SYSCALLS.items())
    report = await _python(
        guest,
        "import ctypes, errno, json\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "libc.syscall.restype = ctypes.c_long\n"
        "def call(number, arguments):\n"
        "    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]\n"
        "    result = libc.syscall(ctypes.c_long(number), *words)\n"
        "    return errno.errorcode[ctypes.get_errno()] if result == -1 else f'worked: {result}'\n"
        f"print(json.dumps({{name: call(*call_) for name, call_ in {{{calls}}}.items()}}))\n",
    )

    answers = json.loads(report)
    assert {name: answer for name, answer in answers.items() if answer not in ("EPERM", "ENOSYS")} == {}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86_64 has two older ways into the kernel")
async def test_the_32_bit_system_calls_end_the_process(guest: Guest) -> None:
    source = (
        'int main(void) { int r; __asm__ volatile("int $0x80" : "=a"(r) : "a"(20)); return r < 0 ? 1 : 0; }'  # getpid
    )

    output = await guest.run(f"cd /tmp && echo '{source}' > i386.c && gcc -o i386 i386.c && ./i386; echo code $?")

    # SIGSYS, or ENOSYS from a kernel without them. What the shell says of it may come on either side.
    assert {"code 159", "code 1"} & set(output.text.splitlines()), output


async def test_sockets_below_ip_are_refused(guest: Guest) -> None:
    report = await _python(
        guest,
        "import socket\n"
        "for name, args in {\n"
        "    'raw': (2, 3, 1), 'raw-ip': (2, 3, 255), 'packet': (17, 3, 0x300), 'packet-dgram': (17, 2, 0x300),\n"
        "    'alg': (38, 5, 0), 'vsock': (40, 1, 0), 'xdp': (44, 3, 0), 'bluetooth': (31, 3, 0), 'can': (29, 3, 1),\n"
        "    'netfilter': (16, 3, 12), 'xfrm': (16, 3, 6), 'generic': (16, 3, 16), 'key': (15, 3, 2),\n"
        "    'uevent': (16, 3, 15), 'raw6': (10, 3, 58), 'tipc': (30, 1, 0), 'rds': (21, 5, 0)}.items():\n"
        "    try: socket.socket(*args); print(name, 'worked')\n"
        "    except OSError: pass\n",
    )

    assert report == ""


async def test_the_network_cannot_be_changed(guest: Guest) -> None:
    output = await guest.run(
        "ip addr add 198.18.0.77/30 dev eth0; ip link set eth0 address 02:00:00:00:00:01; ip link add v type dummy;"
        "ip route add 10.0.0.0/8 via 198.18.0.1; ip neigh add 198.18.0.9 lladdr 02:00:00:00:00:02 dev eth0; ip -o addr"
    )

    lines = output.text.splitlines()
    assert sum("Operation not permitted" in line for line in lines) == 5, output
    assert not re.search(r"198\.18\.0\.77|dummy", "\n".join(line for line in lines if "inet" in line))


async def test_kernel_settings_cannot_be_written(guest: Guest) -> None:
    output = await guest.run(
        "for f in /proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe /proc/sysrq-trigger"
        " /proc/sys/vm/overcommit_memory"
        " /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/all/forwarding /proc/sys/user/max_user_namespaces"
        " /proc/sys/fs/binfmt_misc/register /proc/irq/default_smp_affinity /proc/1/oom_score_adj /proc/1/mem"
        " /sys/kernel/uevent_helper /sys/kernel/mm/transparent_hugepage/enabled /sys/devices/system/cpu/cpu1/online;"
        " do (echo 1 > $f) 2>/dev/null && echo written $f; done; true"
    )

    assert output.text.replace("written /proc/1/oom_score_adj", "").strip() == "", output


async def test_the_hosts_secrets_in_proc_cannot_be_read(guest: Guest) -> None:
    output = await guest.run(
        "for f in cmdline kcore keys kallsyms modules timer_list sched_debug config.gz kpageflags vmallocinfo slabinfo;"
        " do head -c 16 /proc/$f 2>/dev/null | grep -q . && echo $f; done; dmesg 2>/dev/null | head -1; true"
    )

    assert output.text == ""


async def test_sys_holds_nothing_of_the_host(guest: Guest) -> None:
    output = await guest.run("find /sys -maxdepth 2 | sort; find /sys/devices -maxdepth 2; ls /sys/class 2>&1")

    assert set(output.text.splitlines()) <= {
        "/sys",
        "/sys/devices",
        "/sys/devices/system",
        "/sys/devices/system/cpu",
        "/sys/fs",
        "/sys/fs/cgroup",
        "/sys/kernel",
        "/sys/kernel/mm",
        "ls: cannot access '/sys/class': No such file or directory",
    }


async def test_the_cgroup_is_shown_and_cannot_be_left(guest: Guest, world: World) -> None:
    output = await guest.run(
        "cat /proc/self/cgroup; find /sys/fs/cgroup -name cgroup.procs | while read f; do"
        " (echo $$ > $f) 2>/dev/null && echo moved $f; done;"
        "find /sys/fs/cgroup -name release_agent -o -name memory.max -o -name memory.limit_in_bytes | while read f; do"
        " (echo 1 > $f) 2>/dev/null && echo written $f; done;"
        "mkdir /sys/fs/cgroup/memory/x /sys/fs/cgroup/x 2>/dev/null && echo made; true"
    )

    assert "moved" not in output.text
    assert "written" not in output.text
    assert "made" not in output.text
    assert world.settings.instance not in output.text


async def test_devices_cannot_be_made_or_reached(guest: Guest) -> None:
    disk = next(path for path in Path("/sys/block").iterdir() if not path.name.startswith(("loop", "ram")))
    major, minor = (disk / "dev").read_text().strip().split(":")

    output = await guest.run(
        f"mknod /tmp/disk b {major} {minor} && head -c 1 /tmp/disk; mknod /tmp/loop b 7 0 && head -c 1 /tmp/loop;"
        "mknod /tmp/kmsg c 1 11 && head -c 1 /tmp/kmsg; mknod /tmp/mem c 1 1 && head -c 1 /tmp/mem; ls /dev"
    )

    listed = {
        word for line in output.text.splitlines() if not line.startswith(("mknod", "head")) for word in line.split()
    }
    assert output.text.count("Operation not permitted") == 4, output
    assert listed <= {
        *("console", "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin"),
        *("stdout", "tty", "urandom", "zero"),
    }


async def test_the_agent_cannot_be_stopped_read_or_traced(guest: Guest) -> None:
    output = await guest.run(
        "kill -9 1; kill -STOP 1; kill -SEGV 1; kill -TERM 1; cat /proc/1/environ | tr -d '\\0' | head -c 20;"
        "ls -l /proc/1/fd 2>/dev/null | grep -c '^l'; readlink /proc/1/exe; head -c 1 /proc/1/mem;"
        "(echo x > /proc/1/fd/1) 2>/dev/null && echo wrote; true"
    )
    traced = await _python(
        guest,
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.ptrace(16, 1, 0, 0), libc.ptrace(0x4206, 1, 0, 0))\n",  # ATTACH, SEIZE
    )

    assert await guest.machine.alive()
    assert "wrote" not in output.text
    assert "EMBERD" not in output.text
    assert traced == "-1 -1"
    assert (await guest.run("echo here")).text == "here"


async def test_the_agent_and_the_layers_are_read_only(guest: Guest) -> None:
    output = await guest.run(
        "f=/usr/local/lib/.emberd; (echo x >> $f) 2>/dev/null && echo written; rm -f $f 2>/dev/null;"
        "mv $f /tmp 2>/dev/null; test -x $f && echo still"
    )

    assert output.text == "still"


async def test_no_descriptor_of_the_host_is_inherited(guest: Guest, world: World) -> None:
    links = {}
    for path in Path(f"/proc/{guest.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links[path] = str(path.readlink())

    # The agent reads the CPU limit and its own settings, in the machine's own /sys and /proc.
    files = {link: target for link, target in links.items() if target.startswith("/")}
    assert not [target for link, target in files.items() if link.is_dir()]
    assert {target for target in files.values() if not target.startswith(("/sys/fs/cgroup/cpu", "/proc/1/"))} <= {
        "/dev/null",
        f"{guest.machine._root.upper}/agent.log",
    }


async def test_root_inside_is_nobody_outside(guest: Guest, world: World) -> None:
    status = Path(f"/proc/{guest.pid}/status").read_text()
    uid = int(re.search(r"^Uid:\t(\d+)", status, re.M)[1])
    bounding = int(re.search(r"^CapBnd:\t(\w+)", status, re.M)[1], 16)

    assert uid >= world.settings.id_range_start
    for number in (2, 12, 13, 16, 17, 19, 21, 22, 25, 27, 38, 39, 40):
        # DAC_READ_SEARCH NET_ADMIN NET_RAW SYS_MODULE SYS_RAWIO SYS_PTRACE SYS_ADMIN SYS_BOOT SYS_TIME MKNOD PERFMON
        # BPF CHECKPOINT_RESTORE
        assert not bounding & (1 << number), number


async def test_two_machines_have_no_id_in_common(guest: Guest, other: Guest) -> None:
    maps = [Path(f"/proc/{machine.pid}/uid_map").read_text().split() for machine in (guest, other)]

    assert [entry[0] for entry in maps] == ["0", "0"]
    assert [entry[2] for entry in maps] == ["65536", "65536"]
    assert abs(int(maps[0][1]) - int(maps[1][1])) >= 65536


async def test_namespaces_are_the_machines_own(guest: Guest, other: Guest) -> None:
    for kind in ("pid", "mnt", "ipc", "uts", "net", "user", "cgroup"):
        links = {Path(f"/proc/{pid}/ns/{kind}").readlink() for pid in ("self", guest.pid, other.pid)}
        assert len(links) == 3, kind


async def test_processes_and_ipc_of_others_are_not_seen(guest: Guest, other: Guest) -> None:
    await other.run("ipcmk -Q >/dev/null; sleep 4242 >/dev/null 2>&1 &")

    output = await guest.run("ps ax | grep -c '[s]leep 4242'; ipcs -q | grep -c 0x; ls /proc | grep -c '^[0-9]'")

    seen = output.text.split()
    assert seen[:2] == ["0", "0"]
    assert int(seen[2]) < 20


async def test_the_users_set_user_id_programs_work_and_stay_inside(guest: Guest) -> None:
    copy = "cp /bin/bash /tmp/b && sudo chown root /tmp/b && sudo chmod 4755 /tmp/b"
    output = await guest.run(f"{copy} && /tmp/b -p -c 'id -u'", user="user")

    on_host = guest.machine._root.upper / "u/tmp/b"
    assert output.text == "0"
    assert on_host.stat().st_uid >= 1_000_000_000


async def test_other_users_of_the_host_reach_neither_layers_nor_machines(guest: Guest, world: World) -> None:
    """A layer has set-user-id programs of the real root."""
    base = Path("/run") / world.settings.instance
    layer = next((base / "layers").iterdir())
    flags = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(layer) in line).split()[3]

    folders = (layer, guest.machine._root.directory, guest.machine._root.upper, world.data / "node")
    listing = await asyncio.to_thread(
        subprocess.run,
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "ls", *folders],
        capture_output=True,
        text=True,
        check=False,
    )

    assert {"ro", "nosuid", "nodev"} <= set(flags.split(","))
    assert listing.stdout == ""
    assert listing.stderr.count("Permission denied") == 4


@contextlib.contextmanager
def _listeners() -> Iterator[tuple[int, int]]:
    """A TCP and a UDP port that the host serves on every address."""
    with (
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as tcp,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp,
    ):
        for server in (tcp, udp):
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            server.bind(("::", 0))
        tcp.listen()
        udp.settimeout(0.5)
        yield tcp.getsockname()[1], udp.getsockname()[1]
        with pytest.raises(TimeoutError):
            udp.recvfrom(100)


def _host_addresses() -> list[str]:
    shown = subprocess.run(["ip", "-j", "addr"], capture_output=True, text=True, check=True).stdout
    return [info["local"] for link in json.loads(shown) for info in link["addr_info"] if info["scope"] != "host"]


async def test_the_host_is_reached_on_none_of_its_addresses(guest: Guest, other: Guest) -> None:
    with _listeners() as (tcp, udp):
        report = await _python(
            guest,
            "import socket\n"
            f"for address in {_host_addresses()!r}:\n"
            "    family = socket.AF_INET6 if ':' in address else socket.AF_INET\n"
            "    scope = '%eth0' if address.startswith('fe80') else ''\n"
            "    try:\n"
            "        s = socket.socket(family, socket.SOCK_STREAM); s.settimeout(1)\n"
            f"        s.connect((address + scope, {tcp}))\n"
            "        print('tcp', address)\n"
            "    except OSError: pass\n"
            "    try:\n"
            f"        s = socket.socket(family, socket.SOCK_DGRAM); s.sendto(b'x', (address + scope, {udp}))\n"
            "    except OSError: pass\n",
        )

    assert report == ""


async def test_other_machines_are_not_reached(guest: Guest, other: Guest) -> None:
    output = await guest.run(
        f"curl -sS -m 20 http://{other.slot.address}:49983/health; curl -sS -m 20 http://{other.slot.host_address}:49983/"
    )

    assert output.text.count("Failed to connect") + output.text.count("Couldn't connect") >= 2, output


async def test_private_and_metadata_addresses_are_refused_at_once(guest: Guest) -> None:
    report = await _python(
        guest,
        "import socket, time\n"
        "for address in ('169.254.169.254', '10.0.0.1', '172.16.0.1', '192.168.1.1', '100.64.0.1', '224.0.0.1'):\n"
        "    s = socket.socket(); s.settimeout(20)\n"
        "    try: s.connect((address, 80)); print('reached', address)\n"
        "    except TimeoutError: print('slow', address)\n"
        "    except OSError: pass\n",
    )

    assert report == ""


async def test_the_default_gateway_answers_names_and_nothing_else(guest: Guest) -> None:
    output = await guest.run(
        "grep -c nameserver /etc/resolv.conf; getent hosts localhost | head -1;"
        "for p in 22 80 443 3000 3002 8080; do"
        f" curl -s -m 1 http://{guest.slot.host_address}:$p && echo open; done; true"
    )

    assert output.text.splitlines()[0] == "1"
    assert "open" not in output.text


async def test_a_sender_address_that_is_not_the_slots_is_dropped(guest: Guest, other: Guest) -> None:
    """A container cannot forge one; a process in its namespace with the host's rights (a broken container) can."""
    spoofed = str(other.slot.address)
    with _listeners() as (_, udp):
        await asyncio.to_thread(
            subprocess.run,
            [
                "ip",
                "netns",
                "exec",
                guest.slot.netns,
                "python3",
                "-c",
                "import socket\n"
                "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
                "s.setsockopt(socket.SOL_IP, 19, 1)\n"  # IP_TRANSPARENT
                f"s.bind(({spoofed!r}, 0)); s.sendto(b'x', ({str(guest.slot.host_address)!r}, {udp}))\n",
            ],
            check=True,
        )


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def _still_alive(guest: Guest) -> AsyncIterator[None]:
    yield
    async with asyncio.timeout(120):
        assert (await guest.run("true")).code == 0
