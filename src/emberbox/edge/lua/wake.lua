-- What the edge does on a miss: it asks the control plane, which may wake a paused sandbox, and the request goes on.
--
-- A flood of unknown IDs must not become a flood of questions: an answer is kept for a second, one question is asked for
-- all requests that wait for the same sandbox, only so many are on the way at once, and a source that asks for many
-- sandboxes that do not exist is told so without a question.

local answers = require("answers")
local json = require("json")

local URL = os.getenv("EMBERBOX_EDGE_WAKE_URL")
local SECRET_PATH = os.getenv("EMBERBOX_EDGE_SECRET_PATH")
local DEADLINE_MS = tonumber(os.getenv("EMBERBOX_EDGE_WAKE_MS"))
local routes = Map.new(os.getenv("EMBERBOX_EDGE_MAP"), Map._str)

-- Each thread of HAProxy has a Lua state of its own and counts for itself.
local THREADS = tonumber(os.getenv("EMBERBOX_EDGE_THREADS"))
local MOST_ASKED_AT_ONCE = math.max(128 // THREADS, 4)
local MOST_WAITING = math.max(2000 // THREADS, 50)
local MOST_MISSES_A_SECOND = math.max(200 // THREADS, 10)
local POLL_MS, SLOWEST_POLL_MS = 2, 50

local asked = {}         -- sandbox ID and port -> question
local asking = 0         -- questions on the way
local waiting = 0        -- questions that wait for their turn
local misses = {}        -- source address -> misses in this second
local this_second = 0

local function milliseconds()
  local now = core.now()
  return now.sec * 1000 + now.usec // 1000
end

-- Forget what was answered before the last second.
local function turn_the_second()
  local now = core.now().sec
  if now == this_second then return end
  this_second = now
  misses = {}
  local oldest = milliseconds() - 1000
  for key, question in pairs(asked) do
    if question.answered_at and question.answered_at <= oldest then asked[key] = nil end
  end
end

local function secret()
  local file = io.open(SECRET_PATH)
  if not file then return nil end
  local text = file:read("a")
  file:close()
  return (text:gsub("%s+$", ""))
end

local function request(id, port)
  local client = core.httpclient()
  return client:post{
    url = URL,
    headers = {["x-edge-secret"] = {secret() or ""}, ["content-type"] = {"application/json"}},
    body = string.format('{"sandboxID":%s,"port":%d}', json.string(id), port),
    timeout = DEADLINE_MS,
  }
end

-- Run in a task of its own: the question outlives a client that goes away, and others may wait for its answer.
local function ask(question, id, port)
  asking = asking + 1
  local fine, response = pcall(request, id, port)
  asking = asking - 1
  question.status = fine and response and response.status or 0
  question.body = fine and response and response.body or ""
  question.answered_at = milliseconds()
end

local function wait_for_a_turn(deadline)
  if asking < MOST_ASKED_AT_ONCE then return true end
  if waiting >= MOST_WAITING then return false end
  waiting = waiting + 1
  while asking >= MOST_ASKED_AT_ONCE and milliseconds() < deadline do core.msleep(POLL_MS) end
  waiting = waiting - 1
  return asking < MOST_ASKED_AT_ONCE
end

-- The value of a route that the control plane told here but did not set: it has no lane.
local function value_of(told)
  if type(told) ~= "table" then return nil end
  local address = told.address
  local token, mask, ports = told.trafficTokenSha256 or "", told.maskRequestHost or "", told.httpsPorts or {}
  if type(address) ~= "string" or not address:match("^%d+%.%d+%.%d+%.%d+$") then return nil end
  if type(token) ~= "string" or not (token == "" or #token == 64 and token:match("^%x+$")) then return nil end
  if type(mask) ~= "string" or mask:find("[|%c ]") then return nil end
  if type(ports) ~= "table" then return nil end
  for _, port in ipairs(ports) do
    if math.type(port) ~= "integer" then return nil end
  end
  return table.concat({address, "", "", token:lower(), "", table.concat(ports, ","), mask, ""}, "|")
end

local function pass_on(txn, question)
  local told = json.decode(question.body)
  local message = type(told) == "table" and type(told.message) == "string" and told.message
  if question.status < 400 or not message then return answers.refuse(txn, "no_control") end
  answers.send(txn, question.status, message, false)
end

local function wake(txn)
  turn_the_second()
  local id, port = txn:get_var("txn.id"), tonumber(txn:get_var("txn.port"))
  local key = id .. ":" .. port
  local source = txn.f:src() or ""
  local deadline = milliseconds() + DEADLINE_MS + 1000

  local question = asked[key]
  if not question then
    if (misses[source] or 0) >= MOST_MISSES_A_SECOND then return answers.refuse(txn, "flood") end
    question = {}
    asked[key] = question
    -- Every way out of here answers the question: a client may go away while it waits, so that too is in the task.
    core.register_task(function()
      local has_turn = wait_for_a_turn(deadline)
      if has_turn and (misses[source] or 0) < MOST_MISSES_A_SECOND then
        ask(question, id, port)
      else
        question.held_off, question.answered_at = has_turn and "flood" or "busy", milliseconds()
      end
      if question.status == 404 or question.status == 502 then misses[source] = (misses[source] or 0) + 1 end
    end)
  end
  local pause = POLL_MS
  while not question.answered_at and milliseconds() < deadline do
    core.msleep(pause)
    pause = math.min(pause + 1, SLOWEST_POLL_MS)
  end

  if question.held_off then return answers.refuse(txn, question.held_off) end
  if not question.answered_at then return answers.refuse(txn, "no_control") end
  if question.status ~= 200 then return pass_on(txn, question) end
  -- The control plane sets the route before it answers; the map then knows the sandbox's lanes as well.
  local value = routes:lookup(id) or value_of(json.decode(question.body))
  if not value then return answers.refuse(txn, "no_control") end
  txn:set_var("txn.route", value)
end

core.register_action("wake", {"http-req"}, wake, 0)

-- For the routes that mask the host or speak TLS inside: what this port needs.
core.register_action("adapt", {"http-req"}, function(txn)
  local port = txn:get_var("txn.port")
  local https_ports, mask = txn:get_var("txn.https_ports"), txn:get_var("txn.mask")
  if https_ports and ("," .. https_ports .. ","):find("," .. port .. ",", 1, true) then
    txn:set_var("txn.tls", true)
  end
  if mask and mask ~= "" then txn:set_var("txn.masked", (mask:gsub("%${PORT}", port))) end
end, 0)
