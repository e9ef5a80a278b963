// The answers of eval.py report: in a chosen order, of chosen groups, with a text in them; a page of them at once.
// Every text of a model comes into the page as textContent.

const RESULTS = JSON.parse(document.getElementById("data").textContent);
const CUT = 4000;  // characters of a text that are shown at first: a model may repeat itself 50,000 characters long
const WAIT_MS = 150;  // after a key, before the list is searched

function option(select, text, value) {
  element("option", select, text, { value });
}

// A text of somebody else's, whole or cut with a button for the rest. lang: where it is not the page's.
function addText(parent, text, lang) {
  const node = element("div", parent, text, Object.assign({ className: "text", dir: "auto" }, lang && { lang }));
  if (text.length <= CUT) return;
  const isHalf = /[\uD800-\uDBFF]/.test(text[CUT - 1]);  // not between the two halves of a character
  node.textContent = text.slice(0, isHalf ? CUT - 1 : CUT) + " …";
  const label = `Show all ${text.length.toLocaleString("en")} characters`;
  const button = element("button", parent, label, { type: "button", className: "plain" });
  button.addEventListener("click", () => {
    node.textContent = text;
    node.tabIndex = -1;
    node.focus();  // the button goes, and the focus must not go with it
    button.remove();
  });
}

// A folded text comes into the page when it is unfolded.
function addFolded(parent, title, text) {
  const details = element("details", parent);
  element("summary", details, title);
  details.addEventListener("toggle", () => { if (details.children.length === 1) addText(details, text); });
}

function addAnswer(parent, answer) {
  const article = element("article", parent);
  element("h5", article, answer.variant, { dir: "auto" });
  if (answer.prompt) addFolded(article, "What was said before", answer.prompt);
  if (answer.reasoning) {
    const end = answer.unfinished ? " that never ended" : "";
    addFolded(article, `Reasoning${end}, ${answer.reasoning.length.toLocaleString("en")} characters`, answer.reasoning);
  }
  if (answer.text) addText(article, answer.text, answer.lang);
  else element("p", article, "(The answer is empty.)", { className: "soft" });
  for (const judgement of answer.judgements) {
    const line = element("p", article, "", { className: "verdict" });
    element("strong", line, `${judgement.judge}: `);
    line.append(judgement.verdict);
    if (judgement.words) addFolded(article, "The judge's words", judgement.words);
  }
}

function addItem(parent, item) {
  const section = element("section", parent, "", { className: "item", id: item.id, tabIndex: -1 });
  const heading = element("h4", section);
  element("a", heading, item.heading, { href: `#${item.id}` });
  if (item.difference !== null) {
    heading.append(`, difference ${(100 * item.difference).toFixed(1)} %`);
  }
  if (item.prompt) addText(section, item.prompt, item.lang);
  const answers = element("div", section, "", { className: "side-by-side" });
  for (const answer of item.answers) addAnswer(answers, answer);
}

// All texts of an item in small letters, to search in.
function allTexts(item) {
  const texts = [item.heading, item.prompt];
  for (const { variant, text, reasoning, prompt, judgements } of item.answers) {
    texts.push(variant, text, reasoning, prompt);
    for (const { verdict, words } of judgements) texts.push(verdict, words);
  }
  return texts.join("\n").toLowerCase();
}

// The answers of one evaluation. Returns show(id), which shows an item of it.
function startAnswers(parent, { items, orders }) {
  parent.append(document.getElementById("answers").content.cloneNode(true));
  const one = selector => parent.querySelector(selector);
  const form = one("form"), order = one(".order"), words = one(".words"), atOnce = one(".at-once");
  const groups = new Map();  // kind of group -> its select
  const texts = [];
  let first = 0, timer;

  for (const name of Object.keys(orders)) option(order, name, name);
  for (const kind of new Set(items.flatMap(item => Object.keys(item.groups)))) {
    const counts = new Map();
    for (const item of items) counts.set(item.groups[kind], (counts.get(item.groups[kind]) || 0) + 1);
    counts.delete(undefined);
    const select = element("select", element("label", one(".groups"), `${kind} `));
    option(select, `all (${items.length})`, "");
    // A value begins with "=", so that no name of a group is taken for "all".
    for (const [group, count] of counts) option(select, `${group} (${count})`, `=${group}`);
    groups.set(kind, select);
  }

  function isChosen(item, i) {
    for (const [kind, select] of groups) {
      if (select.value && select.value !== `=${item.groups[kind]}`) return false;
    }
    const sought = words.value.trim().toLowerCase();
    if (!sought) return true;
    texts[i] ??= allTexts(item);
    return texts[i].includes(sought);
  }

  const size = () => atOnce.value === "all" ? Infinity : Number(atOnce.value);
  const chosen = () => orders[order.value].filter(i => isChosen(items[i], i));

  function draw() {
    clearTimeout(timer);
    const places = chosen(), end = Math.min(first + size(), places.length);
    const list = document.createDocumentFragment();
    for (const place of places.slice(first, end)) addItem(list, items[place]);
    one(".items").replaceChildren(list);
    const range = end - first < places.length ? `, ${first + 1} to ${end} shown` : "";
    one(".count").textContent = `${places.length} of ${items.length} prompts${range}`;
    for (const pages of parent.querySelectorAll(".pages")) pages.hidden = !range;
    for (const back of parent.querySelectorAll(".back")) back.disabled = first === 0;
    for (const next of parent.querySelectorAll(".next")) next.disabled = end === places.length;
  }

  function chooseAll() {
    words.value = "";
    for (const select of groups.values()) select.value = "";
  }

  function drawFrom(place) {
    first = Math.max(0, place);
    draw();
  }

  function turn(by) {
    drawFrom(first + by * size());
    one(".count").scrollIntoView();
    const heading = one(".items a");
    if (heading) heading.focus({ preventScroll: true });
  }

  form.addEventListener("submit", event => event.preventDefault());
  form.addEventListener("change", () => drawFrom(0));
  one(".all").addEventListener("click", () => { chooseAll(); drawFrom(0); });
  words.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => drawFrom(0), WAIT_MS); });
  for (const back of parent.querySelectorAll(".back")) back.addEventListener("click", () => turn(-1));
  for (const next of parent.querySelectorAll(".next")) next.addEventListener("click", () => turn(1));
  draw();

  return id => {
    const item = items.findIndex(one => one.id === id);
    if (item < 0) return false;
    if (!document.getElementById(id)) {
      if (!chosen().includes(item)) chooseAll();
      const place = chosen().indexOf(item);
      drawFrom(size() === Infinity ? 0 : place - place % size());
    }
    document.getElementById(id).scrollIntoView();
    document.getElementById(id).focus({ preventScroll: true });
    return true;
  };
}

const shows = RESULTS.map(result => startAnswers(document.getElementById(result.element), result));

function showLinked() {
  const id = location.hash.slice(1);
  shows.some(show => show(id));
}

addEventListener("hashchange", showLinked);
showLinked();
