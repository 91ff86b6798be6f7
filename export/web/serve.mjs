// Serve the folder above this one on the loopback: npm start [-- PORT]. Any other local file server does as well.

import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const HERE = "/web/";
const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".css": "text/css; charset=utf-8",
  ".mjs": "text/javascript; charset=utf-8",
  ".wasm": "application/wasm", // or the browser compiles it only after it has come whole
};

const server = createServer(async (request, response) => {
  const { pathname } = new URL(request.url, "http://localhost");
  if (pathname === "/") return response.writeHead(302, { Location: HERE }).end();
  try {
    const path = fileOf(pathname.endsWith("/") ? `${pathname}index.html` : pathname);
    const found = await stat(path);
    if (!found.isFile() || !["GET", "HEAD"].includes(request.method)) throw new Error("no file");
    const type = TYPES[extname(path)] ?? "application/octet-stream";
    response.writeHead(200, { "Content-Type": type, "Content-Length": found.size, "Cache-Control": "no-cache" });
    if (request.method === "HEAD") return response.end();
    return createReadStream(path).pipe(response);
  } catch {
    return response.writeHead(404, { "Content-Type": "text/plain" }).end("not here\n");
  }
});

// Below ROOT, whatever the request says: normalize leaves no ".." behind a leading slash.
function fileOf(pathname) {
  return join(ROOT, normalize(decodeURIComponent(pathname)));
}

server.on("error", (error) => {
  console.error(`serve.mjs: ${error.message}; give another port: npm start -- PORT`);
  process.exitCode = 1;
});
server.listen(Number(process.argv[2] ?? 8080), "127.0.0.1", () => {
  console.log(`http://127.0.0.1:${server.address().port}${HERE}`);
});
