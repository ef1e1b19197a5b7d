-- The edge's own answers: JSON for programs, a page for browsers. Clients match on the words of the messages.

local json = require("json")

local answers = {}

local CONTENT = {json = "application/json", html = "text/html; charset=utf-8"}

local KNOWN = {
  not_found = {502, "The sandbox was not found"},
  port_closed = {502, "The sandbox is running but port is not open"},
  cut_off = {502, "The sandbox closed the connection before it answered"},
  too_slow = {504, "The sandbox did not answer in time"},
  bad_address = {400, "The address names no sandbox: use the host {port}-{sandboxID}.{domain}, "
    .. "or the headers E2b-Sandbox-Id and E2b-Sandbox-Port"},
  bad_id = {400, "The sandbox ID is not valid: it is lower-case letters and digits"},
  bad_port = {400, "The port is not valid: it is a number from 1 to 65535"},
  control = {404, "Not found"},
  token = {403, "The traffic access token is missing or wrong: send it in the header e2b-traffic-access-token"},
  too_many = {429, "There are too many connections to the sandbox"},
  flood = {429, "There are too many requests for sandboxes that do not exist"},
  busy = {503, "The edge is busy waking other sandboxes"},
  no_control = {503, "The control plane does not answer, so the edge cannot tell where the sandbox is"},
  no_api = {503, "The API does not answer"},
}

local PAGE = [[<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>%s</title>
<style>body{font:16px/1.5 system-ui,sans-serif;margin:15vh auto;max-width:36rem;padding:0 1rem;color:#222;background:#fff}
code{background:#8882;padding:.1em .3em;border-radius:.2em}@media(prefers-color-scheme:dark){body{color:#ddd;background:#111}}</style>
</head><body><h1>%s</h1><p>Sandbox <code>%s</code>, port <code>%s</code></p><p>Code %d</p></body></html>
]]

local function escaped(text)
  return (text:gsub("[&<>\"']", function(c) return string.format("&#%d;", c:byte()) end))
end

local function body_of(txn, status, message, with_port)
  local id = txn:get_var("txn.id") or ""
  local port = txn:get_var("txn.port") or ""
  if txn:get_var("txn.html") then
    return PAGE:format(escaped(message), escaped(message), escaped(id), escaped(port), status)
  end
  local port_field = with_port and port:match("^%d+$") and string.format(',"port":%s', port) or ""
  return string.format('{"sandboxId":%s,"message":%s,"code":%d%s}', json.string(id), json.string(message), status, port_field)
end

local function is_preflight(txn)
  return txn.f:method() == "OPTIONS" and txn.f:req_hdr("access-control-request-method") ~= ""
end

-- A preflight that would be refused is allowed, so that a browser goes on and can read the real answer.
local function allow_preflight(txn)
  txn:done(txn:reply{status = 204, reason = "No Content", headers = {
    ["access-control-allow-origin"] = {"*"},
    ["access-control-allow-methods"] = {txn.f:req_hdr("access-control-request-method")},
    ["access-control-allow-headers"] = {txn.f:req_hdr("access-control-request-headers") or "*"},
    ["access-control-max-age"] = {"60"},
    ["vary"] = {"access-control-request-method, access-control-request-headers"},
  }})
end

-- Answer the request with `status` and `message`. Does not return.
function answers.send(txn, status, message, with_port)
  if is_preflight(txn) then allow_preflight(txn) end
  local kind = txn:get_var("txn.html") and "html" or "json"
  local headers = {
    ["content-type"] = {CONTENT[kind]},
    ["access-control-allow-origin"] = {"*"},
    ["access-control-expose-headers"] = {"*"},
    ["cache-control"] = {"no-store"},
  }
  if status == 429 or status == 503 then headers["retry-after"] = {"1"} end
  txn:done(txn:reply{status = status, headers = headers, body = body_of(txn, status, message, with_port)})
end

function answers.refuse(txn, name)
  answers.send(txn, KNOWN[name][1], KNOWN[name][2], false)
end

core.register_action("refuse", {"http-req"}, answers.refuse, 1)

-- The body of an answer that HAProxy makes when the machine, or the API, does not give one.
core.register_fetches("failure", function(txn, name)
  if txn:get_var("txn.for_api") then
    return string.format('{"code":503,"message":%s}', json.string(KNOWN.no_api[2]))
  end
  local known = KNOWN[name]
  return body_of(txn, known[1], known[2], true)
end)

return answers
