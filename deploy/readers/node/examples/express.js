'use strict';
/**
 * A middleware that refuses what the service's queues cannot bear, around a tiny service.
 *
 *     node express.js 8000 /run/tailback/shop/page
 *
 * Where a proxy on this machine says in X-Request-Start when a request came, by how long it waited; else by the share. Only
 * behind a proxy that sets it: from others it is what they like.
 * With express where it is installed (npm install express), else with plain http.
 */
const tailbackPage = require('../tailback_page');

function backpressure(path) {
  const page = tailbackPage.open(path);
  return (req, res, next) => {
    if (page.shouldAdmitAfter(tailbackPage.sinceMs(req.headers['x-request-start']))) return next();
    res.writeHead(503, { 'Retry-After': page.pressure().retryAfterHeader });
    res.end('too busy, come again\n');
  };
}

const [port, path] = process.argv.slice(2);
const refuse = backpressure(path);
const shop = (req, res) => res.end('hello\n');

let express;
try {
  express = require('express');
} catch {
  // Plain http will do.
}

if (express) {
  const app = express();
  app.use(refuse);
  app.get('/', shop);
  app.listen(port);
} else {
  const http = require('node:http');
  http.createServer((req, res) => refuse(req, res, () => shop(req, res))).listen(port);
}
