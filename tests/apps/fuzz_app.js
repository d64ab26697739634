// The backend of fuzz_app.py with Node's HTTP server: node fuzz_app.js PORT
const http = require("node:http");
const unmeant = [];
http
  .createServer((request, response) => {
    let length = 0;
    request.on("data", (piece) => (length += piece.length));
    request.on("end", () => {
      const names = request.rawHeaders.filter((_, index) => index % 2 === 0);
      const protos = names.filter((name) => name.toLowerCase() === "x-forwarded-proto");
      let answer = { token: String(request.headers["x-token"] || ""), length };
      if (request.url === "/unmeant") answer = unmeant;
      else if (protos.length !== 1) unmeant.push(`${request.method} ${request.url} ${names}`);
      const body = JSON.stringify(answer);
      response.writeHead(200, { "content-length": Buffer.byteLength(body) });
      response.end(body);
    });
  })
  .listen(Number(process.argv[2]), "127.0.0.1");
