-- What wrk sends: <path> <first> <count> <method> <body>, then names and values of fields. It counts on from <first> and
-- round within <count> numbers; `{number}` in the path and in the value of a field stands for the number.
-- What it prints at the end is read by load.ts.

local requests, made, count, path, method, body, fields = {}, 0, 1, "", "GET", nil, {}

-- Few enough to keep each request as text: then sending one costs wrk nothing.
local KEPT_MAX = 10000

local function format(number)
  local digits = string.format("%07d", number)
  local headers = {}
  for name, value in pairs(fields) do headers[name] = (value:gsub("{number}", digits)) end
  return wrk.format(method, (path:gsub("{number}", digits)), headers, body)
end

function init(args)
  path, made, count, method = args[1], tonumber(args[2]), tonumber(args[3]), args[4]
  if args[5] ~= "" then body = args[5] end
  for at = 6, #args, 2 do fields[args[at]] = args[at + 1] end
  if count <= KEPT_MAX then
    for number = 0, count - 1 do requests[number] = format(number) end
  end
end

function request()
  local number = made % count
  made = made + 1
  return requests[number] or format(number)
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\nRESULT {"answered": %d, "seconds": %f, "p50Us": %d, "p99Us": %d, "failed": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
