// Served at /_pulse/railway/affinity.js, and loaded by root.tsx before anything else:
//
//     <script src="/_pulse/railway/affinity.js" />
//
// React Router's `.data` loaders and an app's own `fetch` calls do not say which deployment their
// page is from; Pulse's own calls do. This adds the header to calls of the page's own origin, so
// that an old tab goes on talking to the version that it was loaded from.
(() => {
  const QUERY = "pulse_deployment";
  const HEADER = "x-pulse-deployment";
  const STALE = "x-pulse-stale-affinity";
  const KEPT = "__PULSE_DIRECTIVES"; // where Pulse's client keeps what the server told the page

  const stored = () => {
    try {
      return sessionStorage;
    } catch {
      return null; // the browser forbids it here
    }
  };
  // What is there now was told to the page before this one, perhaps by another deployment.
  stored()?.removeItem(KEPT);

  const deployment = () => {
    try {
      return JSON.parse(stored()?.getItem(KEPT) ?? "{}").query?.[QUERY];
    } catch {
      return undefined;
    }
  };

  // A loader whose deployment is gone has no answer: the page goes where it was going, anew.
  const leave = (url, method) => {
    if (method === "GET") {
      url.pathname = url.pathname.replace(/\/_root\.data$/, "/").replace(/\.data$/, "");
      url.searchParams.delete("_routes");
      location.assign(url);
    } else {
      location.reload();
    }
    return new Promise(() => {});
  };

  const fetch = window.fetch;
  window.fetch = async function (input, init) {
    const request = input instanceof Request ? input : null;
    const name = deployment();
    let url;
    try {
      url = new URL(request ? request.url : input, document.baseURI);
    } catch {
      return fetch.call(this, input, init); // which says what is wrong with it
    }
    const headers = new Headers(init?.headers ?? request?.headers);
    const told = url.searchParams.has(QUERY) || headers.has(HEADER);
    if (!name || told || url.origin !== location.origin) {
      return fetch.call(this, input, init);
    }
    headers.set(HEADER, name);
    const answer = await fetch.call(this, input, { ...init, headers });
    if (answer.status === 409 && answer.headers.has(STALE) && url.pathname.endsWith(".data")) {
      return leave(url, (init?.method ?? request?.method ?? "GET").toUpperCase());
    }
    return answer;
  };
})();
