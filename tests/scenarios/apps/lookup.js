// A service that resolves a name in each request: lookup.js PORT. Node does this in libuv's threads, in which glibc asks.
const dns = require("dns");
const http = require("http");

const answer = (request, response) => {
  dns.lookup("api.shop.test", { family: 4 }, (error, address) => {
    response.statusCode = error ? 502 : 200;
    response.end(`${error || address}\n`);
  });
};
http.createServer(answer).listen(Number(process.argv[2]), "127.0.0.1", 511, () => console.log("listening"));
