"""Runs inside a sandbox: a WebSocket server that sends back what it gets. `websocket_echo.py ADDRESS PORT`

RFC 6455 in the standard library, as far as an echo needs it: any image with Python runs it.
"""

import base64
import hashlib
import socket
import struct
import sys
import threading

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def exactly(connection, count):
    data = bytearray()
    while len(data) < count:
        part = connection.recv(min(count - len(data), 65536))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def shake_hands(connection):
    head = b""
    while b"\r\n\r\n" not in head:
        part = connection.recv(4096)
        if not part:
            raise EOFError
        head += part
    lines = head.split(b"\r\n")
    key = next(line.split(b":", 1)[1].strip() for line in lines if line.lower().startswith(b"sec-websocket-key:"))
    accept = base64.b64encode(hashlib.sha1(key + GUID).digest())
    connection.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )


def read_frame(connection):
    first, second = exactly(connection, 2)
    length = second & 127
    if length == 126:
        (length,) = struct.unpack(">H", exactly(connection, 2))
    elif length == 127:
        (length,) = struct.unpack(">Q", exactly(connection, 8))
    mask = exactly(connection, 4)
    data = exactly(connection, length)
    whole = (mask * (length // 4 + 1))[:length]
    return first, (int.from_bytes(data, "big") ^ int.from_bytes(whole, "big")).to_bytes(length, "big")


def write_frame(connection, first, data):
    if len(data) < 126:
        size = bytes([len(data)])
    elif len(data) < 65536:
        size = b"\x7e" + struct.pack(">H", len(data))
    else:
        size = b"\x7f" + struct.pack(">Q", len(data))
    connection.sendall(bytes([first]) + size + data)


def serve(connection):
    with connection:
        try:
            shake_hands(connection)
            while True:
                first, data = read_frame(connection)
                write_frame(connection, first, data)
                if first & 15 == 8:
                    return
        except (EOFError, OSError, StopIteration):
            return


if __name__ == "__main__":
    server = socket.create_server((sys.argv[1], int(sys.argv[2])))
    while True:
        threading.Thread(target=serve, args=(server.accept()[0],), daemon=True).start()
