"""Runs inside a sandbox: answers every request with what it saw, as JSON. `http_echo.py ADDRESS PORT`"""

import http.server
import json
import sys
import time


class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.path.startswith("/slow"):
            self.answer_slowly()
        elif self.path.startswith("/status/"):
            self.send(int(self.path.split("/")[2]), b"as asked")
        else:
            seen = {
                "method": self.command,
                "path": self.path,
                "host": self.headers.get("host"),
                "headers": {name.lower(): value for name, value in self.headers.items()},
                "body": body.decode("latin-1"),
            }
            self.send(200, json.dumps(seen).encode())

    def send(self, status, text):
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def answer_slowly(self):
        self.send_response(200)
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        for n in range(3):
            part = b"part %d\n" % n
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.flush()
            time.sleep(1)
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = answer

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Echo).serve_forever()
