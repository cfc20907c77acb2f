-- Keeps Redis busy for ARGV[1] ms. Redis runs one command at a time, so all others wait.
local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end
local stop = now_us() + ARGV[1] * 1000
while now_us() < stop do end
return 'OK'
