'use strict';
/**
 * A middleware that sheds load as the page asks, around a tiny service.
 *
 *     node express.js 8000 /run/tailback/shop/page
 *
 * If a proxy on this machine sets X-Request-Start, it decides by how long a request waited, else by the admit ratio. Use the
 * header only behind such a proxy: otherwise clients can forge it. Uses express if it is installed (npm install express), else
 * plain http.
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
const shed = backpressure(path);
const shop = (req, res) => res.end('hello\n');

let express;
try {
  express = require('express');
} catch {
  // Plain http.
}

if (express) {
  const app = express();
  app.use(shed);
  app.get('/', shop);
  app.listen(port);
} else {
  const http = require('node:http');
  http.createServer((req, res) => shed(req, res, () => shop(req, res))).listen(port);
}
