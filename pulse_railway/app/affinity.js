// Served at /_pulse/railway/affinity.js, and loaded by root.tsx before anything else:
//
//     <script src="/_pulse/railway/affinity.js" />
//
// Pulse's own requests say which deployment their page is from. React Router's loaders, an app's own
// `fetch`, XMLHttpRequest and EventSource, and forms that are posted do not. This adds the affinity to
// those that go to the page's own origin, so that an old page goes on talking to the version that it
// was loaded from. A form with GET is left alone: its address is shared, and would keep strangers on
// an old version.
(() => {
  const QUERY = "pulse_deployment";
  const HEADER = "x-pulse-deployment";
  const STALE = "x-pulse-stale-affinity";
  const DIRECTIVES = "__PULSE_DIRECTIVES"; // where Pulse's client keeps what the server told the page

  const storage = (() => {
    try {
      return sessionStorage;
    } catch {
      return null; // the browser forbids it here
    }
  })();
  // What is there now was told to the page before this one, perhaps by another deployment.
  storage?.removeItem(DIRECTIVES);

  // The router says with a document which deployment made it. Where that cannot be read (an older
  // router, an older browser), Pulse's directives say it, once its layout is drawn.
  const timing = performance.getEntriesByType("navigation")[0]?.serverTiming ?? [];
  const ofDocument = timing.find(({ name }) => name === "pulse")?.description;

  const deployment = () => {
    if (ofDocument) return ofDocument;
    try {
      return JSON.parse(storage?.getItem(DIRECTIVES) ?? "{}").query?.[QUERY];
    } catch {
      return undefined;
    }
  };

  // A page that comes out of the back/forward cache finds the directives of the page that followed.
  let directives = null;
  addEventListener("pagehide", () => (directives = storage?.getItem(DIRECTIVES)));
  addEventListener("pageshow", ({ persisted }) => {
    if (persisted && directives) storage?.setItem(DIRECTIVES, directives);
  });

  const absolute = (address) => {
    try {
      return new URL(address, document.baseURI);
    } catch {
      return null; // whoever is called says what is wrong with it
    }
  };
  const isOurs = (url) => url?.origin === location.origin && !url.searchParams.has(QUERY);
  const withAffinity = (url) => {
    const name = deployment();
    if (name) url.searchParams.set(QUERY, name);
    return url;
  };

  // A loader whose deployment is gone has no answer: the page goes where it was going, on the active
  // one. That is for navigations; what is loaded in the background gets its 409.
  const router = () => window.__reactRouterDataRouter; // React Router's, on every page of it
  let leaving = false;
  const pageOf = (url) => {
    const page = new URL(url);
    page.pathname = page.pathname.replace(/\/_root\.data$/, "/").replace(/\.data$/, "");
    page.searchParams.delete("_routes");
    return page;
  };
  const navigates = (url) => {
    if (!router()) return true;
    const { state, location: target } = router().state.navigation;
    return state !== "idle" && target?.pathname === pageOf(url).pathname;
  };
  const leave = (url, method) => {
    if (!leaving && method === "GET") location.assign(pageOf(url));
    else if (!leaving) location.reload();
    leaving = true;
    return new Promise(() => {});
  };

  const fetch = window.fetch;
  window.fetch = async function (input, init) {
    const request = input instanceof Request ? input : null;
    const url = absolute(request ? request.url : input);
    const headers = new Headers(init?.headers ?? request?.headers);
    const name = deployment();
    if (!name || !isOurs(url) || headers.has(HEADER)) return fetch.call(this, input, init);
    let answer;
    if ((init?.mode ?? request?.mode) === "no-cors") {
      // such a request takes no header of ours
      const there = withAffinity(new URL(url));
      const body = request?.body ? await request.clone().blob() : undefined;
      const { method, headers, credentials, cache, redirect, keepalive, signal } = request ?? {};
      const same = { method, headers, credentials, cache, redirect, keepalive, signal, body };
      answer = await fetch.call(this, there, { ...(request && same), ...init, mode: "no-cors" });
    } else {
      headers.set(HEADER, name);
      answer = await fetch.call(this, input, { ...init, headers });
    }
    const stale = answer.status === 409 && answer.headers.has(STALE);
    if (stale && url.pathname.endsWith(".data") && navigates(url)) {
      return leave(url, (init?.method ?? request?.method ?? "GET").toUpperCase());
    }
    return answer;
  };

  const { open, send, setRequestHeader } = XMLHttpRequest.prototype;
  const told = new WeakMap(); // XMLHttpRequest -> does it say by itself which deployment it means?
  XMLHttpRequest.prototype.open = function (method, address, ...rest) {
    told.set(this, !isOurs(absolute(address)));
    return open.call(this, method, address, ...rest);
  };
  XMLHttpRequest.prototype.setRequestHeader = function (name, value) {
    if (String(name).toLowerCase() === HEADER) told.set(this, true);
    return setRequestHeader.call(this, name, value);
  };
  XMLHttpRequest.prototype.send = function (body) {
    const name = deployment();
    if (name && told.get(this) === false) this.setRequestHeader(HEADER, name);
    return send.call(this, body);
  };

  const Source = window.EventSource;
  window.EventSource = class EventSource extends Source {
    constructor(address, options) {
      const url = absolute(address);
      super(isOurs(url) ? withAffinity(url) : address, options);
    }
  };

  // The last to hear of a submit: an app that handles it by itself has prevented it by then.
  const sends = (form, submitter) => {
    const method = submitter?.getAttribute("formmethod") ?? form.getAttribute("method") ?? "get";
    if (method.toLowerCase() !== "post") return;
    const [element, name] = submitter?.hasAttribute("formaction")
      ? [submitter, "formaction"]
      : [form, "action"];
    const url = absolute(element.getAttribute(name) || location.href);
    if (isOurs(url)) element.setAttribute(name, withAffinity(url).href);
  };
  addEventListener("submit", (event) => {
    if (!event.defaultPrevented) sends(event.target, event.submitter);
  });
  const submit = HTMLFormElement.prototype.submit; // which no event tells of
  HTMLFormElement.prototype.submit = function () {
    sends(this, null);
    return submit.call(this);
  };
})();
