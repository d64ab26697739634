// Served at /_pulse/railway/affinity.js, and loaded by root.tsx before anything else:
//
//     <script src="/_pulse/railway/affinity.js" />
//
// Pulse's own requests say which deployment their page is from. React Router's loaders, an app's own
// `fetch`, XMLHttpRequest, EventSource and WebSocket, and forms that are posted do not. This adds the
// affinity to those that go to the page's own origin, so that an old page goes on talking to the
// version that it was loaded from. A form with GET is left alone: its address is shared, and would
// keep strangers on an old version. At the end: tabs that move over to another version by themselves.
(() => {
  const QUERY = "pulse_deployment";
  const HEADER = "x-pulse-deployment";
  const STALE = "x-pulse-stale-affinity";
  const OF_LOADER = "x-remix-response"; // on all that a loader of React Router's has answered
  const TARGET = "x-pulse-client-loader-location"; // the page that Pulse's client loader is for
  const RELOAD = "pulse_reload_on_stale_affinity";
  const MOVE = "/_pulse/railway/move";
  const MOVE_PAUSE = 120_000; // ms between two questions whether the tab moves over, at least
  const MOST_PAUSE = 600_000; // ms, of a tab that has long been idle; before, a quarter of that time
  const PAUSES = [300, 1000, 2000]; // ms, before a navigation that met no deployment asks again
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
    leaving = false;
    if (persisted && directives) storage?.setItem(DIRECTIVES, directives);
  });

  const absolute = (address) => {
    try {
      return new URL(address, document.baseURI);
    } catch {
      return null; // whoever is called says what is wrong with it
    }
  };
  const isHere = (url) => url?.origin.replace(/^ws/, "http") === location.origin;
  const isOurs = (url) => isHere(url) && !url.searchParams.has(QUERY);
  const withAffinity = (url) => {
    const name = deployment();
    if (name) url.searchParams.set(QUERY, name);
    return url;
  };

  // A navigation whose deployment is gone, or which the router refuses (maintenance, no connection),
  // would end in React Router's error page, and the page's state with it. Its document is loaded
  // instead: it is the active deployment's, or says what is wrong and tries again by itself.
  const state = () => window.__reactRouterDataRouter?.state; // React Router's, on every page of it
  const pageOf = (url) => {
    const page = new URL(url);
    page.pathname = page.pathname.replace(/\/_(root)?\.data$/, "/").replace(/\.data$/, "");
    page.searchParams.delete("_routes");
    page.hash = state()?.navigation.location?.hash ?? "";
    return page;
  };
  const navigates = (url) => {
    if (!state()) return true;
    return state().navigation.location?.pathname === pageOf(url).pathname; // none: idle
  };
  // A fetcher or a revalidation: what goes wrong there is React Router's error page, too.
  const loads = () => {
    const { revalidation, fetchers } = state() ?? {};
    const pending = (fetcher) => fetcher.state !== "idle";
    return revalidation === "loading" || [...(fetchers?.values() ?? [])].some(pending);
  };
  let leaving = false;
  const leave = (page) => {
    if (!leaving && page) location.assign(page);
    else if (!leaving) location.reload();
    leaving = true;
    return new Promise(() => {});
  };
  // Not what a loader has thrown: for that the app has a page of its own.
  const isUnavailable = ({ status, headers }) =>
    status >= 502 && status <= 504 && !headers.has(OF_LOADER);

  let usedAt = Date.now(); // when somebody, or the app, did something here
  let requests = 0; // under way
  const use = () => (usedAt = Date.now());
  const ended = () => {
    requests -= 1;
    use();
  };

  const fetch = window.fetch;
  window.fetch = function (...given) {
    requests += 1;
    return withPage.apply(this, given).finally(ended);
  };
  const withPage = async function (input, init) {
    const request = input instanceof Request ? input : null;
    const url = absolute(request ? request.url : input);
    const headers = new Headers(init?.headers ?? request?.headers);
    if (!isHere(url)) return fetch.call(this, input, init);
    let options = init;
    if (isOurs(url) && deployment() && !headers.has(HEADER)) {
      if ((init?.mode ?? request?.mode) === "no-cors") {
        // such a request takes no header of ours
        const there = withAffinity(new URL(url));
        const body = request?.body ? await request.clone().blob() : undefined;
        const { method, headers, credentials, cache, redirect, keepalive, signal } = request ?? {};
        const same = { method, headers, credentials, cache, redirect, keepalive, signal, body };
        return fetch.call(this, there, { ...(request && same), ...init, mode: "no-cors" });
      }
      headers.set(HEADER, deployment());
      options = { ...init, headers };
    }
    // Pulse's client loader and React Router's loaders
    const isGet = (init?.method ?? request?.method ?? "GET").toUpperCase() === "GET";
    const isLoader = url.pathname.endsWith(".data");
    const target = () => {
      if (headers.has(TARGET)) return headers.get(TARGET);
      return isLoader && isGet && navigates(url) ? pageOf(url) : null;
    };
    const isRefused = (answer) =>
      isUnavailable(answer) && (headers.has(TARGET) || state()) && target();
    let answer = await fetch.call(this, input, options);
    for (const pause of PAUSES) {
      if (answer.status !== 502 || !isRefused(answer)) break;
      await new Promise((done) => setTimeout(done, pause));
      answer = await fetch.call(this, input, options);
    }
    if (isRefused(answer)) return leave(target());
    const isStale = answer.status === 409 && answer.headers.has(STALE);
    if (isStale && isLoader && (navigates(url) || loads())) return leave(target());
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
    requests += 1;
    this.addEventListener("loadend", ended, { once: true });
    try {
      return send.call(this, body);
    } catch (error) {
      this.removeEventListener("loadend", ended);
      ended();
      throw error;
    }
  };

  const Source = window.EventSource;
  window.EventSource = class EventSource extends Source {
    constructor(address, options) {
      const url = absolute(address);
      super(isOurs(url) ? withAffinity(url) : address, options);
    }
  };

  // Pulse's own names its deployment. Where that is gone, another is taken, as before.
  const Socket = window.WebSocket;
  window.WebSocket = class WebSocket extends Socket {
    constructor(address, protocols) {
      const url = absolute(address);
      const isNamed = isOurs(url) && deployment();
      if (isNamed) withAffinity(url).searchParams.set(RELOAD, "1");
      super(isNamed ? url : address, protocols);
    }
    send(data) {
      if (data?.length !== 1) use(); // not Engine.IO's answer to a ping
      return super.send(data);
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

  // A tab that nobody uses asks now and then whether it is to move over: `--move-idle`. Only the page
  // knows since when it is idle, and whether something would be lost. What it does not know for
  // certain keeps it where it is.
  const USES = "pointerdown pointermove wheel touchmove keydown scroll focus input change drop";
  for (const name of [...USES.split(" "), "pageshow", "visibilitychange"])
    addEventListener(name, use, { capture: true, passive: true });

  // What was typed: element -> its content before, and the page that it was on. An element that is
  // gone may have left what was typed in the app's state, until the page is another.
  const typed = new Map();
  const contentOf = (element) => {
    if (element.isContentEditable) return element.textContent;
    if (!["INPUT", "TEXTAREA", "SELECT"].includes(element.tagName)) return undefined; // not known
    const options = [...(element.selectedOptions ?? [])].map(({ value }) => value);
    return JSON.stringify([element.value, element.checked, options]);
  };
  const type = (element, content) => {
    if (!typed.has(element)) typed.set(element, [content, location.pathname]);
  };
  let focused, before;
  addEventListener(
    "focus",
    (event) => {
      focused = event.composedPath()[0];
      before = contentOf(focused);
    },
    true,
  );
  addEventListener(
    "input",
    (event) => {
      const element = event.composedPath()[0];
      type(element, element === focused ? before : undefined);
    },
    true,
  );
  addEventListener("blur", () => {
    if (document.activeElement?.tagName === "IFRAME") type(document.activeElement);
  });
  let left; // the page with an element that is gone
  const isTyped = () => {
    for (const [element, [content, page]] of typed) {
      const isSame = content !== undefined && contentOf(element) === content;
      if (element.isConnected && !isSame) return true;
      if (element.isConnected) continue;
      typed.delete(element);
      if (page === location.pathname) left = page;
    }
    return left === location.pathname;
  };
  const asksBeforeItIsLeft = () => {
    const event = document.createEvent("BeforeUnloadEvent");
    event.initEvent("beforeunload", false, true);
    return !dispatchEvent(event) || event.returnValue !== "";
  };
  const isInUse = () =>
    document.visibilityState !== "visible" ||
    requests > 0 ||
    isTyped() ||
    [...document.querySelectorAll("audio, video")].some(({ paused }) => !paused);

  let declined; // since when it was idle as it was to move and would not: it does not ask again
  let askedAt = 0;
  setInterval(async () => {
    const since = usedAt;
    const name = deployment();
    // an address that names a version means it
    if (isInUse() || since === declined || !name || !isOurs(absolute(location.href))) return;
    const idle = Math.floor((Date.now() - since) / 1000);
    if (Date.now() - askedAt < Math.min(idle * 250, MOST_PAUSE)) return;
    askedAt = Date.now();
    try {
      const options = { headers: { [HEADER]: name }, cache: "no-store" };
      const answer = await fetch.call(window, `${MOVE}?idle=${idle}`, options);
      if (!answer.ok || (await answer.json()).move !== true) return;
      if (usedAt === since && !isInUse() && !asksBeforeItIsLeft()) location.reload();
      else declined = since;
    } catch {
      // it asks again
    }
  }, MOVE_PAUSE);
})();
