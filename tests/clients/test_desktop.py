"""The `desktop` template by the official `e2b-desktop` client: screen, mouse, keyboard, windows, stream."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from e2b_desktop import Sandbox

from tests.clients.support.instance import Emberbox
from tests.clients.support.raw import host_request, websocket
from tests.clients.support.shipped import ensure_built
from tests.clients.support.timing import eventually, seconds, whole_seconds

# The template is built once for the run: a few hundred megabytes of packages.
pytestmark = [pytest.mark.timeout(seconds(3000)), pytest.mark.xdist_group("desktop")]


@pytest.fixture(scope="module")
def desktop(emberbox: Emberbox) -> Iterator[Sandbox]:
    ensure_built(emberbox, "desktop")
    made = Sandbox.create(timeout=whole_seconds(600), resolution=(1024, 768))
    yield made
    made.kill()


def test_a_screenshot_has_the_size_of_the_screen(desktop: Sandbox) -> None:
    picture = bytes(desktop.screenshot())

    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (1024, 768)
    assert desktop.get_screen_size() == (1024, 768)


def test_the_mouse_goes_where_it_is_told(desktop: Sandbox) -> None:
    desktop.move_mouse(100, 200)
    assert desktop.get_cursor_position() == (100, 200)

    desktop.drag((110, 210), (300, 320))
    assert desktop.get_cursor_position() == (300, 320)


def test_what_is_typed_reaches_the_window_in_front(desktop: Sandbox) -> None:
    desktop.launch("xfce4-terminal")
    windows = eventually(
        lambda: _windows(desktop, "xfce4-terminal"), within=180, every=0.5, what="a terminal window opens"
    )
    eventually(lambda: desktop.get_current_window_id() in windows, within=90, every=0.5, what="it is in front")

    desktop.write("echo typed by hand > /tmp/typed")
    desktop.press("enter")

    eventually(lambda: desktop.files.exists("/tmp/typed"), within=90, every=0.5, what="the shell ran the line")
    assert desktop.files.read("/tmp/typed") == "typed by hand\n"
    assert "Terminal" in desktop.get_window_title(windows[0])


def test_the_screen_is_streamed_to_a_browser_behind_a_password(desktop: Sandbox, emberbox: Emberbox) -> None:
    desktop.stream.start(require_auth=True)
    try:
        key = desktop.stream.get_auth_key()
        assert key in desktop.stream.get_url(auth_key=key)
        page = host_request(emberbox, desktop.get_host(6080), "/vnc.html")
        assert page.status_code == 200
        assert "noVNC" in page.text
        with websocket(emberbox, f"ws://{desktop.get_host(6080)}/websockify") as screen:
            assert screen.recv(timeout=seconds(120)).startswith(b"RFB ")
    finally:
        desktop.stream.stop()


def _windows(desktop: Sandbox, name: str) -> list[str]:
    try:
        return desktop.get_application_windows(name)
    except Exception:  # xdotool finds none yet: the client raises
        return []
