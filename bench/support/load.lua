-- What wrk sends: GET <prefix><number><suffix>, counting on from <first> and round within <count> numbers.
-- What it prints at the end is read by load.ts.

local requests, made, count, prefix, suffix = {}, 0, 1, "", ""

-- Few enough to keep each request as text: then sending one costs wrk nothing.
local KEPT_MAX = 10000

local function format(number)
  return wrk.format("GET", string.format("%s%07d%s", prefix, number, suffix))
end

function init(args)
  prefix, suffix, made, count = args[1], args[2], tonumber(args[3]), tonumber(args[4])
  if args[5] ~= "" then wrk.headers["Authorization"] = args[5] end
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
