(* A service under OCaml's master lock: turns PORT. 16 threads accept connections, and each request computes for 4 ms. SIGUSR1: for
   30 ms. SIGUSR2: for 4 ms again. *)

let threads = 16
let milliseconds = ref 4.0

let compute digests =
  let text = ref "" in
  for _ = 1 to digests do
    text := Digest.string (!text ^ "x")
  done

(* Before there are other threads: the clock counts the time of all of them. *)
let digests_per_ms =
  let digests = 100_000 in
  let start = Sys.time () in
  compute digests;
  float_of_int digests /. ((Sys.time () -. start) *. 1000.0)

let response =
  "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"

let answer connection request =
  if Unix.read connection request 0 (Bytes.length request) > 0 then begin
    compute (int_of_float (digests_per_ms *. !milliseconds));
    ignore (Unix.write_substring connection response 0 (String.length response))
  end

let serve listener =
  let request = Bytes.create 4096 in
  while true do
    match Unix.accept ~cloexec:true listener with
    | exception Unix.Unix_error (Unix.EINTR, _, _) -> ()
    | connection, _ ->
        (try answer connection request with Unix.Unix_error _ -> ());
        Unix.close connection
  done

let () =
  let becomes ms = Sys.Signal_handle (fun _ -> milliseconds := ms) in
  Sys.set_signal Sys.sigusr1 (becomes 30.0);
  Sys.set_signal Sys.sigusr2 (becomes 4.0);
  Sys.set_signal Sys.sigpipe Sys.Signal_ignore;
  let listener = Unix.socket ~cloexec:true Unix.PF_INET Unix.SOCK_STREAM 0 in
  let port = int_of_string Sys.argv.(1) in
  Unix.bind listener (Unix.ADDR_INET (Unix.inet_addr_loopback, port));
  Unix.listen listener 128;
  let started = List.init threads (fun _ -> Thread.create serve listener) in
  print_endline "listening";
  List.iter Thread.join started
