#!/usr/bin/env python3
"""Sandboxes from the command line, with nothing but Python's standard library.

Usage: sandbox.py create|run|put|get|url|pause|resume|list|kill ...   (--help after any of them)

Exit codes: that of the command for `run`; 2 when Emberbox refused something; 3 when it cannot be reached.
"""

import argparse
import base64
import contextlib
import http.client
import json
import os
import shutil
import struct
import sys
import urllib.error
import urllib.parse
import urllib.request

AGENT_PORT = 49983
END_STREAM = 2
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Refused(Exception):
    """Emberbox said no; the message is its own."""


def variable(name):
    value = os.environ.get(name)
    if not value:
        raise Refused(f'{name} is not set; run: eval "$(emberbox env)"')
    return value.rstrip("/")


def send(method, url, body=None, headers=None, timeout=90):
    request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
    try:
        return OPENER.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        with contextlib.suppress(ValueError, AttributeError):
            text = json.loads(text).get("message", text)
        raise Refused(f"{error.code}: {text}") from None


def api(method, path, body=None):
    headers = {"X-API-Key": variable("E2B_API_KEY"), "Content-Type": "application/json"}
    data = json.dumps(body).encode() if body is not None else None
    with send(method, variable("E2B_API_URL") + path, data, headers) as response:
        text = response.read()
    return json.loads(text) if text else None


def sandbox_headers(sandbox, user=None):
    detail = api("GET", f"/sandboxes/{urllib.parse.quote(sandbox, safe='')}")
    headers = {"E2b-Sandbox-Id": sandbox, "E2b-Sandbox-Port": str(AGENT_PORT)}
    if detail.get("envdAccessToken"):
        headers["X-Access-Token"] = detail["envdAccessToken"]
    if user:
        headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:".encode()).decode()
    return headers


def create(args):
    body = {
        "templateID": args.template,
        "timeout": args.timeout,
        "metadata": dict(args.metadata),
        "envVars": dict(args.env),
    }
    print(api("POST", "/v2/sandboxes", body)["sandboxID"])


def run(args):
    command = args.command
    if args.background:
        command = f"setsid nohup /bin/bash -c {quoted(command)} >/tmp/background.log 2>&1 </dev/null & echo started"
    process = {"cmd": "/bin/bash", "args": ["-l", "-c", command], "envs": dict(args.env)}
    if args.cwd:
        process["cwd"] = args.cwd
    message = json.dumps({"process": process, "stdin": False}).encode()
    headers = sandbox_headers(args.sandbox, args.user)
    headers.update({"Content-Type": "application/connect+json", "Connect-Protocol-Version": "1"})
    if args.limit:
        headers["Connect-Timeout-Ms"] = str(args.limit * 1000)
    headers["Keepalive-Ping-Interval"] = "30"
    url = variable("E2B_SANDBOX_URL") + "/process.Process/Start"
    with send("POST", url, b"\0" + struct.pack(">I", len(message)) + message, headers) as stream:
        for flags, content in envelopes(stream):
            if flags & END_STREAM:
                problem = content.get("error")
                raise Refused(
                    problem.get("message", str(problem)) if problem else "the command ended without its result"
                )
            event = content.get("event", {})
            for name, target in (("stdout", sys.stdout), ("stderr", sys.stderr)):
                if name in event.get("data", {}):
                    target.buffer.write(base64.b64decode(event["data"][name]))
                    target.flush()
            if "end" in event:
                code = event["end"].get("exitCode", 0)
                return code if code >= 0 else 128
    raise Refused("the connection ended before the command did")


def envelopes(stream):
    while True:
        head = exactly(stream, 5)
        if head is None:
            return
        flags, length = struct.unpack(">BI", head)
        yield flags, json.loads(exactly(stream, length) or b"{}")


def exactly(stream, count):
    parts = b""
    while len(parts) < count:
        part = stream.read(count - len(parts))
        if not part:
            return None
        parts += part
    return parts


def quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


def file_url(path):
    return variable("E2B_SANDBOX_URL") + "/files?" + urllib.parse.urlencode({"path": path, "username": "user"})


def put(args):
    headers = sandbox_headers(args.sandbox)
    headers["Content-Type"] = "application/octet-stream"
    with open(args.source, "rb") as source:
        headers["Content-Length"] = str(os.fstat(source.fileno()).st_size)
        send("POST", file_url(args.target), source, headers).close()
    print(args.target)


def get(args):
    headers = sandbox_headers(args.sandbox)
    with send("GET", file_url(args.source), None, headers) as response, open(args.target, "wb") as target:
        shutil.copyfileobj(response, target, 1 << 20)
    print(args.target)


def url(args):
    detail = api("GET", f"/sandboxes/{args.sandbox}")
    domain = detail.get("domain") or urllib.parse.urlsplit(variable("E2B_SANDBOX_URL")).netloc
    scheme = urllib.parse.urlsplit(variable("E2B_SANDBOX_URL")).scheme
    print(f"{scheme}://{args.port}-{args.sandbox}.{domain}")


def pause(args):
    api("POST", f"/sandboxes/{args.sandbox}/pause", {})
    print("paused")


def resume(args):
    api("POST", f"/sandboxes/{args.sandbox}/connect", {"timeout": args.timeout})
    print("running")


def kill(args):
    api("DELETE", f"/sandboxes/{args.sandbox}")
    print("killed")


def list_all(args):
    for one in api("GET", "/v2/sandboxes?state=running,paused"):
        print(one["sandboxID"], one["state"], one.get("alias") or one["templateID"], "until", one["endAt"])


def pair(text):
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def parser():
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name, function, text, sandbox=True):
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        if sandbox:
            sub.add_argument("sandbox", help="ID of the sandbox")
        return sub

    sub = command("create", create, "start a sandbox and print its ID", sandbox=False)
    sub.add_argument("--template", default="base")
    sub.add_argument("--timeout", type=int, default=300, help="seconds until it ends")
    sub.add_argument("--metadata", type=pair, action="append", default=[], metavar="NAME=VALUE")
    sub.add_argument("--env", type=pair, action="append", default=[], metavar="NAME=VALUE")
    sub = command("run", run, "run a shell command")
    sub.add_argument("command")
    sub.add_argument("--background", action="store_true", help="leave it running; output goes to /tmp/background.log")
    sub.add_argument("--cwd", help="directory to run in")
    sub.add_argument("--env", type=pair, action="append", default=[], metavar="NAME=VALUE")
    sub.add_argument("--user", default="user")
    sub.add_argument("--limit", type=int, default=0, help="kill it after this many seconds; 0: never")
    sub = command("put", put, "copy a file into the sandbox")
    sub.add_argument("source")
    sub.add_argument("target")
    sub = command("get", get, "copy a file out of the sandbox")
    sub.add_argument("source")
    sub.add_argument("target")
    sub = command("url", url, "print where a port answers")
    sub.add_argument("port", type=int)
    command("pause", pause, "stop it and keep it")
    sub = command("resume", resume, "let it run again, or extend its time")
    sub.add_argument("--timeout", type=int, default=300)
    command("list", list_all, "list sandboxes", sandbox=False)
    command("kill", kill, "end it")
    return top


def main():
    args = parser().parse_args()
    try:
        return args.function(args) or 0
    except Refused as error:
        print(f"sandbox.py: {error}", file=sys.stderr)
        return 2
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        print(f"sandbox.py: Emberbox cannot be reached: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"sandbox.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
