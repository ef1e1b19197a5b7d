"""Answers with a greeting."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(Path(__file__).with_name("greeting").read_bytes())


HTTPServer(("0.0.0.0", 8000), Handler).serve_forever()
