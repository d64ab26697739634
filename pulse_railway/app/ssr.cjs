// Preloaded by Node beside the second process of an app and further ones (serve.py).
//
// Pulse's React server asks Python for what a page shows. The address is a constant of the build, on
// this machine: the first process's. Each page is to be rendered by the process that was asked for
// it, whose state its tab has from then on.
"use strict";
const own = new URL(process.env.PULSE_SSR_BACKEND_URL);
const first = String(Number(own.port) - Number(process.env.PULSE_RAILWAY_INSTANCE) + 1);
const HERE = new Set(["127.0.0.1", "localhost", "[::1]"]);

const { fetch } = globalThis;
globalThis.fetch = (input, init) => {
  const isRequest = input instanceof Request;
  let url;
  try {
    url = new URL(isRequest ? input.url : input);
  } catch {
    return fetch(input, init); // says what is wrong with it
  }
  if (url.protocol !== "http:" || !HERE.has(url.hostname) || (url.port || "80") !== first) {
    return fetch(input, init);
  }
  url.host = own.host;
  return fetch(isRequest ? new Request(url, input) : url, init);
};
