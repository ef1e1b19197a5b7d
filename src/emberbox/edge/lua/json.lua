-- JSON, as much as the edge needs: reading the control plane's answers, writing strings.

local json = {}

local ESCAPES = {['"'] = '"', ["\\"] = "\\", ["/"] = "/", b = "\b", f = "\f", n = "\n", r = "\r", t = "\t"}
local DEEPEST = 16

local function skip(text, at)
  return text:match("^[ \t\r\n]*()", at)
end

local function read_string(text, at)
  local parts = {}
  while true do
    local plain, stop = text:match('^([^"\\]*)()', at)
    parts[#parts + 1] = plain
    local mark = text:sub(stop, stop)
    if mark == '"' then return table.concat(parts), stop + 1 end
    if mark ~= "\\" then error("unfinished string") end
    local letter = text:sub(stop + 1, stop + 1)
    if letter == "u" then
      local code = tonumber(text:match("^%x%x%x%x", stop + 2) or error("bad \\u"), 16)
      at = stop + 6
      local low = code >= 0xD800 and code < 0xDC00 and text:match("^\\u(%x%x%x%x)", at)
      if low then
        code = 0x10000 + (code - 0xD800) * 0x400 + (tonumber(low, 16) - 0xDC00)
        at = at + 6
      end
      parts[#parts + 1] = utf8.char(code)
    else
      parts[#parts + 1] = ESCAPES[letter] or error("bad escape")
      at = stop + 2
    end
  end
end

local read

local function read_list(text, at, depth)
  local list = {}
  at = skip(text, at)
  if text:sub(at, at) == "]" then return list, at + 1 end
  while true do
    list[#list + 1], at = read(text, at, depth)
    at = skip(text, at)
    local mark = text:sub(at, at)
    at = at + 1
    if mark == "]" then return list, at end
    if mark ~= "," then error("bad list") end
  end
end

local function read_object(text, at, depth)
  local object = {}
  at = skip(text, at)
  if text:sub(at, at) == "}" then return object, at + 1 end
  while true do
    at = skip(text, at)
    if text:sub(at, at) ~= '"' then error("bad key") end
    local key
    key, at = read_string(text, at + 1)
    at = skip(text, at)
    if text:sub(at, at) ~= ":" then error("no colon") end
    object[key], at = read(text, at + 1, depth)
    at = skip(text, at)
    local mark = text:sub(at, at)
    at = at + 1
    if mark == "}" then return object, at end
    if mark ~= "," then error("bad object") end
  end
end

function read(text, at, depth)
  if depth > DEEPEST then error("too deep") end
  at = skip(text, at)
  local mark = text:sub(at, at)
  if mark == "{" then return read_object(text, at + 1, depth + 1) end
  if mark == "[" then return read_list(text, at + 1, depth + 1) end
  if mark == '"' then return read_string(text, at + 1) end
  local word, stop = text:match("^([%w+.-]+)()", at)
  if word == "true" then return true, stop end
  if word == "false" then return false, stop end
  if word == "null" then return nil, stop end
  return tonumber(word) or error("bad value"), stop
end

-- The value that `text` holds, or nil when it is not JSON. null is nil.
function json.decode(text)
  local fine, value, stop = pcall(read, text, 1, 0)
  if not fine or skip(text, stop) <= #text then return nil end
  return value
end

-- `text` as a JSON string. Bytes above 127 go through as they are.
function json.string(text)
  return '"' .. text:gsub('[%c"\\\127]', function(c) return string.format("\\u%04x", c:byte()) end) .. '"'
end

return json
