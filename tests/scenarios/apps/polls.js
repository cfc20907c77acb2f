// A service with long polls: polls.js PORT. /poll is answered after five seconds, all else at once.
const http = require("http");

const answer = (request, response) => {
  const text = "ok\n";
  const end = () => response.writeHead(200, { "Content-Length": text.length }).end(text);
  setTimeout(end, request.url === "/poll" ? 5000 : 0);
};
http.createServer(answer).listen(Number(process.argv[2]), "127.0.0.1", 511, () => console.log("listening"));
