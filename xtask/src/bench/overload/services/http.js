'use strict';
// A Node service with the middleware of deploy/readers/node/examples/express.js. Each request blocks its event loop for MS
// milliseconds, as rendering or a synchronous call does, but without using CPU time.
const [reader, port, path, , ms] = process.argv.slice(2);
const tailbackPage = require(reader);
const http = require('node:http');

const page = tailbackPage.open(path);
const nothing = new Int32Array(new SharedArrayBuffer(4));

http
  .createServer((req, res) => {
    if (!page.shouldAdmitAfter(tailbackPage.sinceMs(req.headers['x-request-start']))) {
      res.writeHead(503, { 'Retry-After': page.pressure().retryAfterHeader });
      return res.end('too busy, come again\n');
    }
    Atomics.wait(nothing, 0, 0, Number(ms));
    res.end('done\n');
  })
  .listen({ port: Number(port), host: '127.0.0.1', backlog: 128 });
