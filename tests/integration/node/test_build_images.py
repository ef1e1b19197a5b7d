"""Builds from images of a registry: what becomes of an image, and everything that can be wrong with one."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from emberbox.images.references import host_architecture
from emberbox.wire import node_pb2 as wire
from tests.support import registry as images
from tests.support.builds import build, look, read_until, request, step
from tests.support.node import NodeProcess
from tests.support.registry import File, LocalRegistry, layer, tiny_files

pytestmark = [pytest.mark.root, pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("node_build_images")]

PASSWORD = "pass:word with $igns"
INDEX = "application/vnd.oci.image.index.v1+json"


@pytest.fixture(scope="module")
def registry() -> Iterator[LocalRegistry]:
    if lacking := images.missing():
        pytest.skip(f"this machine lacks {lacking}")
    with images.local_registry() as entered:
        yield entered


@pytest.fixture(scope="module")
def closed(registry: LocalRegistry) -> Iterator[LocalRegistry]:
    with images.local_registry(user="me", password=PASSWORD) as entered:
        yield entered


@pytest.fixture(scope="module")
def tiny() -> bytes:
    return layer(tiny_files())


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def node(registry: LocalRegistry, closed: LocalRegistry) -> AsyncIterator[NodeProcess]:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces, mounts and cgroups")
    node = NodeProcess(
        warm_min=0,
        warm_max=0,
        insecure_registries=(registry.host, closed.host),
        registry_mirrors={"hub.example": f"{registry.host}/mirrored"},
        image_max_mb=256,
        image_max_compressed_mb=64,
    )
    async with node as entered:
        yield entered


def leftovers(node: NodeProcess) -> list[str]:
    directory = node.settings.node_dir
    found = [*(directory / "building").iterdir(), *(directory / "layers").glob(".*")]
    mounted = [line for line in Path("/proc/mounts").read_text().splitlines() if str(node.data) in line]
    return [*node.traces(), *(str(path) for path in found), *mounted]


async def test_an_image_becomes_a_template(node: NodeProcess, registry: LocalRegistry, tiny: bytes) -> None:
    more = layer(
        [
            File("etc/.wh.shadow"),
            images.folder("srv"),
            File("srv/owned", b"x", 0o640, 1234),
            images.hardlink("srv/again", "srv/owned"),
            images.symlink("srv/absolute", "/etc/passwd"),
            File("usr/bin/suid", b"x", 0o4755),
        ]
    )
    whole = layer([images.folder("srv"), File("srv/.wh..wh..opq"), File("srv/only", b"x")])
    first = layer([File("srv/gone", b"x"), File("etc/shadow", b"x")])
    name = registry.push("tiny", [tiny, first, whole, more], config={"Env": ["A=b=c", "PATH=/opt/x:/usr/bin:/bin"]})

    told = await build(node, step("RUN", "id -un; pwd; echo $A"), from_image=name)
    output = await look(
        node,
        told.image,
        'id; pwd; echo "$A $PATH"; cd /srv; stat -c "%n %a %u %N" * /usr/bin/suid; [ again -ef owned ] && echo one;'
        "ls /etc/shadow 2>&1; id -un > ~/writable && cat ~/writable",
    )

    lines = output.text.splitlines()
    assert lines[0].startswith("uid=1000(user) gid=1000(user)")
    assert lines[1:3] == ["/home/user", "b=c /opt/x:/usr/bin:/bin"]
    assert "owned 640 1234 'owned'" in lines
    assert "only 644 0 'only'" in lines
    assert "absolute 777 0 'absolute' -> '/etc/passwd'" in lines
    assert "/usr/bin/suid 4755 0 '/usr/bin/suid'" in lines
    assert not any(line.startswith("gone") for line in lines)
    assert lines[-3:] == ["one", "ls: cannot access '/etc/shadow': No such file or directory", "user"]
    assert len(told.image.layers) == 2
    assert "sudo" in told.text  # it has none, and nothing to install one with
    assert leftovers(node) == []


async def test_a_debian_image_gets_what_templates_have(node: NodeProcess, registry: LocalRegistry) -> None:
    try:
        debian = await asyncio.to_thread(images.debian_layer)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"Debian's mirror cannot be reached: {error.stderr[-300:]!r}")
    name = await asyncio.to_thread(registry.push, "debian", [debian], config={"Env": ["PATH=/usr/bin:/bin:/opt/bin"]})

    told = await build(node, step("RUN", "sudo id -un; echo $PATH"), from_image=name)
    output = await look(
        node,
        told.image,
        "id; sudo id -un; for p in curl ss pgrep tar; do command -v $p; done; ls /var/lib/apt/lists; echo $PATH;"
        "ls -A /var/tmp /tmp; stat -c '%a %U' ~ /etc/sudoers.d/user",
    )

    assert [line.entry.message for line in told.logs if line.step == "1"][1:] == ["root", "/usr/bin:/bin:/opt/bin"]
    assert output.text.splitlines() == [
        "uid=1000(user) gid=1000(user) groups=1000(user)",
        "root",
        *("/usr/bin/curl", "/usr/bin/ss", "/usr/bin/pgrep", "/usr/bin/tar"),
        "/usr/bin:/bin:/opt/bin",
        *("/tmp:", "", "/var/tmp:"),
        "755 user",
        "440 root",
    ]


async def test_the_same_image_is_pulled_once(node: NodeProcess, registry: LocalRegistry, tiny: bytes) -> None:
    name = registry.push("once", [tiny, layer([File("once", b"1")])])
    first = await build(node, from_image=name)

    second = await build(node, from_image=name, team_id="other")
    registry.push("once", [tiny, layer([File("once", b"2")])])
    third = await build(node, from_image=name)

    assert first.cached == []
    assert second.cached == ["base", "base"]
    assert second.image.layers == first.image.layers
    assert third.cached == []
    assert (await look(node, third.image, "cat /once")).text == "2"


async def test_images_come_by_digest_and_from_a_mirror(node: NodeProcess, registry: LocalRegistry, tiny: bytes) -> None:
    registry.push("mirrored/app", [tiny])

    mirrored = await build(node, from_image="hub.example/app")

    assert mirrored.done is not None, mirrored.failed


async def test_layers_may_be_compressed_with_zstd(node: NodeProcess, registry: LocalRegistry, tiny: bytes) -> None:
    name = registry.push("zstd", [tiny, images.in_zstd(layer([File("by-zstd", b"read")]))])

    told = await build(node, from_image=name)

    assert (await look(node, told.image, "cat /by-zstd")).text == "read"


async def test_the_hosts_architecture_is_taken(node: NodeProcess, registry: LocalRegistry, tiny: bytes) -> None:
    entries = []
    for arch in ("riscv64", host_architecture()):
        place = node.data / f"layout-{arch}"
        digest = images.write_layout(place, [tiny, layer([File("arch", arch.encode())])], arch=arch)
        registry.push_layout(place, "multi", tag=arch)
        size = (place / "blobs/sha256" / digest.removeprefix("sha256:")).stat().st_size
        entries.append(
            {
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": digest,
                "size": size,
                "platform": {"os": "linux", "architecture": arch},
            }
        )
    for tag, chosen in (("both", entries), ("other", entries[:1])):
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": chosen}
        registry.put(f"/v2/multi/manifests/{tag}", json.dumps(index).encode(), INDEX)

    both = await build(node, from_image=registry.name("multi", "both"))
    other = await build(node, from_image=registry.name("multi", "other"))
    single = await build(node, from_image=registry.name("multi", "riscv64"))

    assert (await look(node, both.image, "cat /arch")).text == host_architecture()
    assert f"not there for linux/{host_architecture()}; there is: linux/riscv64" in other.why("base")
    assert "is for riscv64" in single.why("base")


async def test_credentials_open_a_registry_and_are_kept_nowhere(
    node: NodeProcess, closed: LocalRegistry, tiny: bytes
) -> None:
    name = closed.push("private", [tiny])

    def credentials(**values: str) -> wire.RegistryCredentials:
        return wire.RegistryCredentials(kind="registry", **values)

    nobody = await build(node, from_image=name)
    wrong = await build(node, from_image=name, credentials=credentials(username="me", password="wrong"))
    right = await build(node, from_image=name, credentials=credentials(username="me", password=PASSWORD))
    nobody_again = await build(node, from_image=name)

    assert "needs credentials" in nobody.why("base")
    assert "refused the credentials" in wrong.why("base")
    assert right.done is not None, right.failed
    assert "needs credentials" in nobody_again.why("base")
    assert PASSWORD not in node.log.read_text()
    assert PASSWORD not in right.text
    kept = [path for path in node.data.rglob("*") if path.is_file() and path.stat().st_size < 1 << 20]
    assert not any(PASSWORD.encode() in path.read_bytes() for path in kept)
    assert leftovers(node) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{host}/nothing-here", "does not exist"),
        ("127.0.0.1:1/x", "cannot be reached"),
        ("nothing.invalid/x", "does not resolve"),
        ("{host}/Upper Case", "not the name of an image"),
    ],
)
async def test_an_image_that_cannot_be_had_says_why(
    node: NodeProcess, registry: LocalRegistry, name: str, words: str
) -> None:
    told = await build(node, from_image=name.format(host=registry.host))

    assert words in told.why("base")
    assert leftovers(node) == []


async def test_a_registry_without_tls_must_be_named_in_the_settings(node: NodeProcess) -> None:
    with images.local_registry() as other:
        told = await build(node, from_image=other.name("x"))

    assert "EMBERBOX_INSECURE_REGISTRIES" in told.why("base")


@pytest.mark.parametrize("word", ["Pulling", "Unpacking"])
async def test_a_build_that_is_cancelled_while_its_image_comes_leaves_nothing(
    node: NodeProcess, registry: LocalRegistry, tiny: bytes, word: str
) -> None:
    noise = await asyncio.to_thread(os.urandom, 40 << 20)
    asked = request(from_image=registry.push(f"cancelled-{word.lower()}", [tiny, layer([File("noise", noise)])]))
    stream = node.stub.Build(asked, timeout=300)
    await read_until(stream, word)

    await node.stub.CancelBuild(wire.CancelBuildRequest(build_id=asked.build_id), timeout=300)

    assert leftovers(node) == []
    stream.cancel()


# ---- what an image may not do


async def test_an_image_that_unpacks_to_more_than_allowed_is_refused(
    node: NodeProcess, registry: LocalRegistry, tiny: bytes
) -> None:
    name = registry.push("bomb", [tiny, layer([File("zeros", bytes(300 << 20))])])

    told = await build(node, from_image=name)

    assert "more than 256 MiB unpacked" in told.why("base")
    assert leftovers(node) == []


async def test_an_image_of_too_many_files_is_refused(node: NodeProcess, registry: LocalRegistry) -> None:
    name = registry.push("many", [layer([File(f"f/{number}") for number in range(70_000)])])

    told = await build(node, from_image=name)

    assert "more files than fit" in told.why("base")
    assert leftovers(node) == []


async def test_an_image_that_is_too_large_is_not_even_fetched(node: NodeProcess, registry: LocalRegistry) -> None:
    noise = await asyncio.to_thread(os.urandom, 66 << 20)
    name = registry.push("large", [layer([File("noise", noise)])])

    told = await build(node, from_image=name)

    assert "64 MiB are allowed" in told.why("base")
    assert "Pulling" not in told.text
    assert leftovers(node) == []


async def test_layers_cannot_write_outside_of_the_image(
    node: NodeProcess, registry: LocalRegistry, tiny: bytes, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "kept").write_text("kept")
    up = "../" * 20
    evil = [
        images.symlink("away", str(victim)),
        File("away/through-a-link", b"x"),
        File(f"{up}{victim}/by-dots", b"x"),
        File(f"{victim}/absolute", b"x"),
        images.symlink("relative", up + str(victim)),
        File("relative/by-a-relative-link", b"x"),
        File("away/.wh.kept"),
        File(f"{up}{victim}/.wh.kept"),
    ]
    name = registry.push("evil", [tiny, layer(evil)])

    told = await build(node, from_image=name)

    assert sorted(path.name for path in victim.iterdir()) == ["kept"]
    assert told.done is not None or told.why("base")
    assert leftovers(node) == []


async def test_devices_of_an_image_open_nothing(node: NodeProcess, registry: LocalRegistry, tiny: bytes) -> None:
    null = File("null", kind=tarfile.CHRTYPE, mode=0o666, device=(1, 3))
    loop = File("loop", kind=tarfile.BLKTYPE, mode=0o666, device=(7, 0))
    name = registry.push("device", [tiny, layer([null, loop])])

    told = await build(node, from_image=name)

    output = await look(node, told.image, "head -c 1 /null; head -c 1 /loop", user="root")
    assert output.text.count("Permission denied") == 2
    assert leftovers(node) == []


async def test_a_damaged_layer_is_refused(node: NodeProcess, registry: LocalRegistry, tmp_path: Path) -> None:
    place = tmp_path / "layout"
    images.write_layout(place, [layer([File("damaged", b"x")])])
    manifest = json.loads((place / "index.json").read_bytes())["manifests"][0]["digest"].removeprefix("sha256:")
    described: Any = json.loads((place / "blobs/sha256" / manifest).read_bytes())
    blob = place / "blobs/sha256" / described["layers"][0]["digest"].removeprefix("sha256:")
    registry.push_layout(place, "damaged")
    stored = registry.blobs / "sha256" / blob.name[:2] / blob.name / "data"
    stored.write_bytes(stored.read_bytes()[:-20] + bytes(20))

    told = await build(node, from_image=registry.name("damaged"))

    assert "not what its manifest says" in told.why("base")
    assert leftovers(node) == []


async def test_an_image_without_bash_says_so(node: NodeProcess, registry: LocalRegistry) -> None:
    no_bash = [file for file in tiny_files() if file.name != "usr/bin/bash"]

    told = await build(node, from_image=registry.push("no-bash", [layer(no_bash)]))
    nothing = await build(node, from_image=registry.push("nothing", [layer([File("x", b"x")])]))

    assert "no bash" in told.why("base")
    assert "no shell" in nothing.why("base")
    assert leftovers(node) == []


async def test_bash_comes_from_the_images_package_manager(node: NodeProcess, registry: LocalRegistry) -> None:
    script = b'#!/bin/sh\necho "$@" >/asked; [ "$1" = add ] && cp /usr/lib/bash-of-a-package /usr/bin/bash\n'
    files = [
        File("usr/lib/bash-of-a-package", file.data, 0o755) if file.name == "usr/bin/bash" else file
        for file in tiny_files()
    ]

    told = await build(node, from_image=registry.push("apk", [layer([*files, File("usr/bin/apk", script, 0o755)])]))
    broken = [*files, File("usr/bin/apk", b"#!/bin/sh\necho network is down >&2; exit 1\n", 0o755)]
    failed = await build(node, from_image=registry.push("apk-broken", [layer(broken)]))

    output = await look(node, told.image, "cat /asked; id -un")
    assert output.text.startswith("add --no-cache bash sudo ca-certificates")
    assert output.text.endswith("user")
    assert "no bash" in failed.why("base")
    assert "network is down" in failed.text


async def test_a_number_that_another_user_has_is_left_to_it(
    node: NodeProcess, registry: LocalRegistry, tiny: bytes
) -> None:
    passwd = b"root:x:0:0:root:/root:/bin/bash\nnode:x:1000:1000::/home/node:/bin/bash\n"
    taken = layer([File("etc/passwd", passwd), File("etc/group", b"root:x:0:\nnode:x:1000:\n")])

    told = await build(node, from_image=registry.push("taken", [tiny, taken]))

    assert (await look(node, told.image, "id -un; id -u")).text.split() == ["user", "1001"]
