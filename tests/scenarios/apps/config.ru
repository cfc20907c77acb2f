# A service under Ruby's VM lock: each request computes for as many milliseconds as the file APP_MS contains.
require "digest"

run lambda { |_|
  ms = File.read(ENV["APP_MS"]).to_f
  till = Process.clock_gettime(Process::CLOCK_THREAD_CPUTIME_ID) + ms / 1000
  text = ""
  500.times { text = Digest::MD5.hexdigest(text + "x") } while Process.clock_gettime(Process::CLOCK_THREAD_CPUTIME_ID) < till
  [200, { "Content-Type" => "text/plain", "Content-Length" => "3" }, ["ok\n"]]
}
