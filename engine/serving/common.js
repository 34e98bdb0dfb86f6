// Texts of users and of models enter a page as text nodes alone; no HTML is ever made of them.
const $ = id => document.getElementById(id);
const MOST_TRIES = 6;  // while the server is full

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);  // strings become text nodes
  return element;
}

function read(key, fallback) {
  try { return JSON.parse(localStorage.getItem(key)) ?? fallback; } catch { return fallback; }
}

const wait = (seconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, 1000 * seconds);
  signal?.addEventListener("abort", () => { clearTimeout(timer); reject(signal.reason); });
});

function askKey() {
  const dialog = $("key-dialog");
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise(resolve => dialog.addEventListener("close", () => {
    const key = dialog.returnValue === "use" ? $("key").value.trim() : "";
    $("key").value = "";
    if (key) try { sessionStorage.setItem("cria.key", key); } catch { sessionKey = key; }
    resolve(Boolean(key));
  }, {once: true}));
}
let sessionKey = "";
function storedKey() { try { return sessionStorage.getItem("cria.key") || sessionKey; } catch { return sessionKey; } }

/** Return the response of a path; asks for the key where it is wanted. Throws Error with a text for the user. */
async function request(path, body, signal) {
  for (;;) {
    const headers = {"Content-Type": "application/json"};
    if (storedKey()) headers.Authorization = `Bearer ${storedKey()}`;
    let response;
    try {
      response = await fetch(path, {method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body)});
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Error("The server cannot be reached. Is it still running?");
    }
    if (response.ok) return response;
    if (response.status === 401 && await askKey()) { signal?.throwIfAborted(); continue; }
    let message = `The server answered with status ${response.status}.`;
    try { message = (await response.json()).error.message; } catch { /* not our server's error: the status says it */ }
    const problem = Object.assign(new Error(message), {status: response.status});
    if (response.status === 503 || response.status === 429)
      problem.retryAfter = Math.min(Number(response.headers.get("Retry-After")) || 1, 30);
    throw problem;
  }
}

/** Return the response of a path. While the server is full it is asked again, as soon as it says; tell(text) is told. */
async function requestPatiently(path, body, signal, tell, begin = () => {}) {
  for (let tries = 1; ; tries++) {
    try {
      begin();
      const response = await request(path, body, signal);
      tell("");
      return response;
    } catch (error) {
      if (!error.retryAfter || tries === MOST_TRIES) throw error;
      tell(`The server is busy; trying again in ${error.retryAfter} s.`);
      await wait(error.retryAfter, signal);
    }
  }
}

/** Yield the events of a stream. Throws Error where it ends before its [DONE], or tells of an error. */
async function* readEvents(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let text = "";
  for (;;) {
    let part;
    try { part = await reader.read(); }
    catch (error) { if (error.name === "AbortError") throw error; part = {done: true}; }
    if (part.done) throw new Error("The connection ended before the answer did.");
    text += decoder.decode(part.value, {stream: true});
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;  // a comment that keeps the connection open
      if (event === "data: [DONE]") return;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

// ---- what pages do alike -----------------------------------------------------------------------------------------------

function tell(text) { $("notice").textContent = text; $("notice").hidden = !text; }
function focusAsk() { if (!matchMedia("(pointer: coarse)").matches) $("ask").focus(); }  // there a keyboard would open
function isAtEnd() { const log = $("log"); return log.scrollHeight - log.scrollTop - log.clientHeight < 60; }
function scrollDown() { $("log").scrollTop = $("log").scrollHeight; }

function isSendKey(event, isInput) {
  if (event.key !== "Enter" || event.isComposing || event.shiftKey) return false;
  return event.ctrlKey || event.metaKey || (!isInput && !matchMedia("(pointer: coarse)").matches);
}

// The dialog of settings: it has a field for each of the defaults, begins with current() and hands what is saved to save().
function bindSettings(defaults, current, save) {
  const names = Object.keys(defaults), dialog = $("settings");
  const fill = from => { for (const name of names) $(name).value = from[name]; };
  for (const field of dialog.querySelectorAll("input, textarea")) if (!(field.id in defaults)) field.parentElement.remove();
  $("show-settings").addEventListener("click", () => { fill(current()); dialog.showModal(); });
  dialog.querySelector("form").addEventListener("submit", () => {  // "close" comes later, perhaps after the page is left
    const read = field => field.type !== "number" || field.value === "" ? field.value : Number(field.value);
    save(Object.fromEntries(names.map(name => [name, read($(name))])));
  });
  $("defaults").addEventListener("click", () => fill(defaults));
  $("no-settings").addEventListener("click", () => dialog.close());
}

$("no-key").addEventListener("click", () => $("key-dialog").close(""));
