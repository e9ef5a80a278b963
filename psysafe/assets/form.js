// What all pages for raters share: who rates, a rater's order of the items, storage, moving between items, files.
//
// An answer is an entry, name -> { value, time }; its name begins with its item's id and a space. time: milliseconds
// since 1970. Of two versions of an entry, as of another tab or a file, the later one counts. A cleared one is null.

const byId = id => document.getElementById(id);
const DATA = JSON.parse(byId("data").textContent);
// Chromium has one localStorage for all pages from files: the key says which page and which rater.
const PREFIX = `psysafe ${DATA.kind} ${DATA.page} `;
const MAX_FILE_BYTES = 2e7;

let page;  // what this page's own script gives to startForm
let rater = "", entries = {}, order = [], place = 0;
let isStored = true, isExported = true;

// A function that gives numbers from 0 up to 1, the same for the same text on every machine: mulberry32, seeded with
// the 32-bit FNV-1a hash of the text's UTF-8 bytes.
function randomNumbers(text) {
  let state = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) state = Math.imul(state ^ byte, 0x01000193);
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
  };
}

// Fisher and Yates: from the end, each changes places with one that is not behind it.
function shuffled(items, random) {
  const result = [...items];
  for (let i = result.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [result[i], result[j]] = [result[j], result[i]];
  }
  return result;
}

// Entries and storage

const valueOf = name => entries[name] ? entries[name].value : null;
const isAnswered = name => valueOf(name) !== null;

// Takes the later version of every entry; returns how many changed.
function merge(others) {
  const later = Object.entries(others).filter(([name, { time }]) => !entries[name] || time > entries[name].time);
  for (const [name, entry] of later) entries[name] = entry;
  return later.length;
}

// What this browser holds of a rater; nothing where storage is refused, as in some private windows, or damaged.
function stored(name) {
  try {
    const saved = Object.entries(JSON.parse(localStorage.getItem(PREFIX + name)) || {});
    return Object.fromEntries(saved.filter(([, entry]) => entry && Number.isFinite(entry.time)));
  } catch {
    return {};
  }
}

function storedRaters() {
  try {
    return Object.keys(localStorage).filter(key => key.startsWith(PREFIX)).map(key => key.slice(PREFIX.length)).sort();
  } catch {
    return [];
  }
}

function save() {
  merge(stored(rater));  // another tab may have saved: its entries must not go
  try {
    localStorage.setItem(PREFIX + rater, JSON.stringify(entries));
    isStored = true;
  } catch {
    isStored = false;
  }
  byId("not-kept").textContent = isStored ? "" : "This browser stores nothing. Export before you close the page.";
  byId("not-kept").hidden = isStored;
}

// The rater of this tab, so that a reload goes on. A second tab may have another one.
function rememberRater(name) {
  try {
    sessionStorage.setItem(PREFIX, name);
  } catch {
    // Refused: after a reload the name is asked for again.
  }
}

function rememberedRater() {
  try {
    return sessionStorage.getItem(PREFIX) || "";
  } catch {
    return "";
  }
}

function setEntry(name, value) {
  const earlier = entries[name] ? entries[name].time : 0;
  entries[name] = { value, time: Math.max(Date.now(), earlier + 1) };
  isExported = false;
  save();
  refresh();
}

// Questions of an item. name: of the entry

// options: [{ value, label, key, meaning }]; of: what the question is about, for screen readers
function choice(parent, title, of, name, options) {
  const group = element("fieldset", parent);
  const legend = element("legend", group, title);
  element("span", legend, ` ${of}`, { className: "unseen" });
  const choose = option => setEntry(name, option.value);
  for (const option of options) {
    const label = element("label", group, "", { title: option.meaning || "" });
    const radio = element("input", label, "", { type: "radio", name, value: option.value });
    radio.dataset.entry = name;
    radio.addEventListener("change", () => choose(option));
    label.append(` ${option.label}`);
  }
  const clear = element("button", group, "clear", { type: "button", className: "clear", tabIndex: -1 });
  clear.setAttribute("aria-label", `clear ${title} ${of}`);
  clear.addEventListener("click", () => { setEntry(name, null); group.querySelector("input").focus(); });
  const meaning = element("p", group, "", { className: "meaning" });
  group.addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const option = options.find(({ key }) => key === event.key.toLowerCase());
    if (option) {
      choose(option);
      group.querySelector("input:checked").focus();
    } else if (event.key === "Delete" || event.key === "Backspace") {
      setEntry(name, null);
    } else return;
    event.preventDefault();
  });
  group.refresh = () => {
    const value = valueOf(name);
    for (const radio of group.querySelectorAll("input")) radio.checked = value !== null && radio.value === String(value);
    clear.hidden = value === null;
    const chosen = options.find(option => option.value === value);
    meaning.textContent = chosen && chosen.meaning || "";
    meaning.hidden = !options.some(option => option.meaning);
  };
}

function note(parent, title, name) {
  const label = element("label", parent, title);
  const text = element("textarea", label);
  text.addEventListener("input", () => setEntry(name, text.value || null));
  label.refresh = () => {
    if (text !== document.activeElement) text.value = valueOf(name) || "";  // never under the hands of who types
  };
}

// Moving between items

const nAnswered = item => page.questions(item).filter(isAnswered).length;
const isComplete = item => nAnswered(item) === page.questions(item).length;

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;  // else a screen reader would say it again
}

function refresh() {
  byId("content").querySelectorAll("*").forEach(node => node.refresh && node.refresh());
  const nComplete = order.filter(isComplete).length;
  Object.assign(byId("progress"), { max: order.length, value: nComplete });
  setText(byId("count"), `${nComplete} of ${order.length} items complete`);
  order.forEach((item, i) => {
    const state = isComplete(item) ? "complete" : nAnswered(item) ? "begun" : "open";
    setText(byId("places").options[i], `item ${i + 1}, ${state}`);
  });
}

function show(number) {
  place = number;
  byId("content").replaceChildren();
  byId("place").textContent = `Item ${place + 1} of ${order.length}`;
  page.show(order[place], byId("content"));
  byId("places").selectedIndex = place;
  refresh();
  byId("place").focus();
  byId("place").scrollIntoView();
}

function next() {
  if (place + 1 < order.length) return show(place + 1);
  say(`That was the last item. ${byId("count").textContent}. Export what you have rated.`);
  byId("export").focus();
}

function pause(isPaused) {
  byId("item").hidden = isPaused;
  byId("paused").hidden = !isPaused;
  byId(isPaused ? "resting" : "place").focus();
}

const say = text => { byId("message").textContent = text; };

// Raters

function begin(name) {
  rater = name;
  entries = stored(name);
  rememberRater(name);
  const random = randomNumbers(`${DATA.page}\n${name}`);
  order = shuffled(DATA.items, random);
  page.begin(random);
  byId("rater").textContent = `Rater: ${name}`;
  byId("places").replaceChildren(...order.map(() => document.createElement("option")));
  byId("who").hidden = true;
  byId("work").hidden = byId("export").hidden = byId("item").hidden = false;
  byId("paused").hidden = true;
  document.querySelectorAll("main > details").forEach(details => { details.open = false; });
  say("");
  save();
  show(Math.max(0, order.findIndex(item => !isComplete(item))));
}

function askName() {
  [rater, entries, order] = ["", {}, []];
  rememberRater("");
  byId("work").hidden = byId("export").hidden = true;
  byId("who").hidden = false;
  byId("content").replaceChildren();
  byId("name").value = "";
  const names = storedRaters();
  byId("known").hidden = !names.length;
  byId("known").querySelectorAll("button").forEach(button => button.remove());
  for (const name of names) {
    const button = element("button", byId("known"), name, { type: "button", className: "plain" });
    button.addEventListener("click", () => begin(name));
  }
}

// Files

function download() {
  const content = { page: DATA.page, rater, ...page.toFile(entries) };
  const url = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1) + "\n"], { type: "application/json" }));
  const link = document.createElement("a");
  const name = rater.replace(/[^\p{L}\p{N}]+/gu, "-");
  Object.assign(link, { href: url, download: `${DATA.kind}-${DATA.page}-${name}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
  isExported = true;
  say(`Exported: ${byId("count").textContent}.`);
}

// The entries of an exported file, as page.fromFile reads them. Error for what is no file of this page.
function readFile(text) {
  let content;
  try {
    content = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  const { page: digest, rater: name } = content || {};
  if (digest !== DATA.page) throw new Error("it belongs to another page");
  if (typeof name !== "string" || name !== tidy(name) || !name) throw new Error("it names no rater");
  if (rater && name !== rater) throw new Error(`it is ${name}'s, and you rate as ${rater}`);
  if (!rater) begin(name);
  return page.fromFile(content);
}

async function load(file) {
  try {
    if (file.size > MAX_FILE_BYTES) throw new Error("it is too large");
    const changed = merge(readFile(await file.text()));
    save();
    refresh();
    say(`${file.name} is loaded: ${changed} of its answers were new.`);
  } catch (error) {
    say(`${file.name} was not loaded: ${error.message}.`);
  }
}

const tidy = name => name.normalize("NFC").trim().replace(/\s+/g, " ");

// page: { questions(item) -> names of the entries that a complete item has; show(item, parent), draws it; begin(random),
// for what else is drawn for a rater; toFile(entries) -> object; fromFile(object) -> entries }
function startForm(ofPage) {
  page = ofPage;
  byId("who").addEventListener("submit", event => {
    event.preventDefault();
    const name = tidy(byId("name").value);
    if (name) begin(name);
  });
  byId("change").addEventListener("click", () => { askName(); byId("name").focus(); });
  byId("back").addEventListener("click", () => show(Math.max(0, place - 1)));
  byId("next").addEventListener("click", next);
  byId("places").addEventListener("change", () => show(byId("places").selectedIndex));
  byId("pause").addEventListener("click", () => pause(true));
  byId("continue").addEventListener("click", () => pause(false));
  byId("export").addEventListener("click", download);
  byId("file").addEventListener("change", async event => {
    const input = event.target;
    if (input.files.length) await load(input.files[0]);
    input.value = "";  // so that the same file can be chosen again
  });
  document.addEventListener("keydown", event => {
    if (!rater) return;
    if (event.key === "Escape") pause(byId("paused").hidden);
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && byId("paused").hidden) {
      event.preventDefault();  // on a button it would be a click as well
      next();
    }
  });
  addEventListener("storage", event => {
    if (!rater || event.key !== PREFIX + rater) return;
    merge(stored(rater));
    refresh();
  });
  addEventListener("beforeunload", event => {
    if (!isStored && !isExported) event.preventDefault();
  });
  const name = rememberedRater();
  if (name) begin(name);
  else askName();  // without the focus: the notice is read first
}
