// The caption explorer. All state is in the address: image, method, filter, map and word (method.number); whatever changes
// it sets the hash, and the page is drawn from the hash alone. What is pointed at or has the focus is shown, not kept.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const byId = new Map(data.images.map((image) => [String(image.id), image]));
  const methods = data.methods.filter((m) => m !== "base");
  const filters = { all: "all images", ...data.groups };
  const kinds = ["effect", "attention", "none"];
  const drawn = {};  // what the page shows now

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // ---- state
  const passing = (filter, method) =>
    data.images.filter((i) => i.captions[method] && (filter === "all" || i.groups[method].includes(filter)));

  function read() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const pick = (key, allowed, usual) => (allowed.includes(asked.get(key)) ? asked.get(key) : usual);
    const state = {
      method: pick("method", methods, data.settings.shown),
      filter: pick("filter", Object.keys(filters), "all"),
      map: pick("map", kinds, "effect"),
    };
    const first = passing(state.filter, state.method)[0] || data.images[0];
    state.image = pick("image", [...byId.keys()], String(first.id));
    state.word = asked.get("word") || "";
    return state;
  }

  function go(change) {
    const state = { ...read(), ...change };
    const filled = Object.entries(state).filter(([, value]) => value);
    location.hash = new URLSearchParams(filled).toString();
    draw();  // at once; the event that follows finds nothing left to do
  }

  // ---- images
  function drawGrid(state) {
    const shown = passing(state.filter, state.method);
    at("count").textContent = `${shown.length} of ${data.images.length}: ${filters[state.filter]}`;
    at("grid").replaceChildren(...shown.map((image) => element("li",
      { role: "option", tabindex: "-1", "data-id": image.id, "aria-selected": "false" },
      element("img", { src: `pictures/${image.id}.webp`, loading: "lazy", alt: `Image ${image.id}: ${image.objects.join(", ")}` }))));
  }

  function options() { return [...at("grid").children]; }

  function rove(list, item) {
    for (const other of list) other.tabIndex = other === item ? 0 : -1;
  }

  function markChosen(state) {
    for (const option of options()) option.setAttribute("aria-selected", String(option.dataset.id === state.image));
    rove(options(), options().find((o) => o.dataset.id === state.image) || options()[0]);
  }

  function columns() {
    const [first, ...rest] = options();
    return 1 + rest.filter((option) => option.offsetTop === first.offsetTop).length;
  }

  function moved(list, index, key, step) {
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, ArrowDown: index + step, ArrowUp: index - step,
      Home: 0, End: list.length - 1 }[key];
    return to === undefined ? null : list[Math.max(0, Math.min(list.length - 1, to))];
  }

  at("grid").addEventListener("keydown", (event) => {
    const option = event.target.closest("li");
    if (!option) return;
    const next = moved(options(), options().indexOf(option), event.key, columns());
    if (next) {
      rove(options(), next);
      next.focus();
    } else if (event.key === "Enter" || event.key === " ") {
      go({ image: option.dataset.id, word: "" });
      at("detail-title").focus();
    } else return;
    event.preventDefault();
  });
  at("grid").addEventListener("click", (event) => {
    const option = event.target.closest("li");
    if (option) go({ image: option.dataset.id, word: "" });
  });

  // ---- captions
  const meaning = { right: "in the image", wrong: "not in the image", companion: "not in the image, a planted companion" };
  const signs = { right: "", wrong: "✗", companion: "✗*" };

  function word(part, name) {
    const [text, , state, map] = part;
    const classes = `word ${state === "right" ? "right" : "wrong"}${state === "companion" ? " companion" : ""}`;
    const active = map >= 0;
    const made = element(active ? "button" : "span", active ? { class: classes, type: "button", tabindex: "-1", "data-word": name } : { class: classes });
    if (signs[state]) made.append(element("span", { class: "sign", "aria-hidden": "true" }, signs[state]));
    made.append(text, element("span", { class: "hidden" }, ` (${meaning[state]})`));
    return made;
  }

  function caption(image, method, heading) {
    let number = 0;
    const parts = image.captions[method].map((part) => (typeof part === "string" ? part : word(part, `${method}.${number++}`)));
    const mapped = data.mapped.includes(method) ? "" : " (no maps)";
    return element("div", { "data-method": method }, element(heading, {}, method + mapped), element("p", {}, ...parts));
  }

  function words() { return [...document.querySelectorAll("#captions button.word")]; }

  function drawDetail(state) {
    const image = byId.get(state.image);
    at("detail-title").textContent = `Image ${image.id}: ${image.objects.join(", ")}`;
    at("image").src = `pictures/${image.id}.webp`;
    at("image").alt = `Test image with ${image.objects.join(", ")}`;
    const here = ["base", state.method].filter((m) => image.captions[m]);
    at("captions").replaceChildren(...here.map((m) => caption(image, m, "h3")));
    const others = data.methods.filter((m) => !here.includes(m) && image.captions[m]);
    at("others").replaceChildren(...others.map((m) => caption(image, m, "h4")));
    for (const button of document.querySelectorAll("#others button.word")) button.replaceWith(plain(button));
    rove(words(), words()[0]);
  }

  function plain(button) {
    return element("span", { class: button.className }, ...button.childNodes);
  }

  // ---- maps
  function bytes(text, signed) {
    const raw = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return signed ? new Int8Array(raw.buffer) : raw;
  }

  function find(image, name) {
    const cut = name.lastIndexOf(".");
    const parts = (image.captions[name.slice(0, cut)] || []).filter((part) => typeof part !== "string");
    const part = parts[Number(name.slice(cut + 1))];
    return part && part[3] >= 0 ? { method: name.slice(0, cut), text: part[0], state: part[2], map: data.maps[part[3]] } : null;
  }

  function values(found, kind) {
    const [attention, effect] = found.map;
    const full = kind === "effect" ? 127 : 255;
    return Array.from(bytes(kind === "effect" ? effect : attention, kind === "effect"), (v) => v / full);
  }

  function drawMap(state, name) {
    const found = name && find(byId.get(state.image), name);
    for (const button of words()) button.classList.toggle("shown", Boolean(found) && button.dataset.word === name);
    for (const button of words()) button.setAttribute("aria-pressed", String(button.dataset.word === state.word));
    at("overlay").dataset.word = found ? name : "";
    at("overlay").replaceChildren(...(found && state.map !== "none" ? cells(values(found, state.map), state.map) : []));
    at("overlay").style.gridTemplateColumns = `repeat(${data.grid}, 1fr)`;
    at("readout").textContent = found ? sentence(found) : "Point at an underlined word, or move to it with Tab and the arrows.";
  }

  function cells(shares, kind) {
    return shares.map((v) => {
      const colour = kind === "attention" ? "--look" : v >= 0 ? "--for" : "--against";
      const cell = element("span", { style: `background: rgba(var(${colour}), ${(0.8 * Math.abs(v)).toFixed(3)})` });
      if (kind === "effect" && data.grid <= 12 && Math.abs(v) > 0.15) cell.textContent = v > 0 ? "+" : "−";
      return cell;
    });
  }

  function place(index) { return `row ${Math.floor(index / data.grid) + 1}, column ${(index % data.grid) + 1}`; }

  function sentence(found) {
    const effect = values(found, "effect").map((v) => v * data.scale.effect);
    const look = values(found, "attention");
    const most = effect.indexOf(Math.max(...effect)), eye = look.indexOf(Math.max(...look));
    const { block } = data.settings;
    return `“${found.text}” in the caption of ${found.method}, ${meaning[found.state]}: it loses most, `
      + `${effect[most].toFixed(1)} nats, when the ${block} × ${block} patches around ${place(most)} are grey. `
      + `${Math.round(100 * found.map[2])} % of attention lies on the image, most at ${place(eye)}.`;
  }

  function drawLegend(state) {
    const { effect, attention } = data.scale;
    const bar = (from, to) => {
      const made = element("span", { class: "bar", "aria-hidden": "true" });
      made.style.background = `linear-gradient(to right, ${from}, ${to})`;
      return made;
    };
    const strong = (name) => `rgba(var(${name}), 0.8)`;
    const scales = {
      none: [],
      attention: ["0", bar("transparent", strong("--look")), `${(100 * attention).toFixed(1)} % of the word's attention in a patch`],
      effect: [`−${effect.toFixed(1)}`, bar(`${strong("--against")}, transparent`, strong("--for")),
        `+${effect.toFixed(1)} nats: blue and + speak for the word, orange and − against it`],
    };
    at("legend").replaceChildren(...scales[state.map]);
  }

  // ---- events of the detail: pointing and focus show a word, Enter or a click keeps it
  const captions = at("captions");
  const show = (event) => {
    const button = event.target.closest("button.word");
    if (button) drawMap(read(), button.dataset.word);
  };
  const unshow = () => {
    const active = document.activeElement.closest("#captions button.word");
    drawMap(read(), active ? active.dataset.word : read().word);
  };
  captions.addEventListener("pointerover", show);
  captions.addEventListener("pointerleave", unshow);
  captions.addEventListener("focusin", show);
  captions.addEventListener("focusout", () => setTimeout(unshow));
  captions.addEventListener("click", (event) => {
    const button = event.target.closest("button.word");
    if (button) go({ word: read().word === button.dataset.word ? "" : button.dataset.word });
  });
  captions.addEventListener("keydown", (event) => {
    const next = moved(words(), words().indexOf(event.target), event.key, 1);
    if (!next) return;
    rove(words(), next);
    next.focus();
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !event.target.closest("#detail")) return;
    if (read().word) go({ word: "" });
    else (options().find((o) => o.tabIndex === 0) || at("method")).focus();
  });

  // ---- controls
  at("method").append(...methods.map((m) => element("option", { value: m }, m)));
  at("method").addEventListener("change", () => go({ method: at("method").value, word: "" }));
  at("filters").append(...Object.entries(filters).map(([name, label]) =>
    element("button", { type: "button", "data-filter": name, "aria-pressed": "false" }, label)));
  at("filters").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const filter = button.dataset.filter, { method, image } = read();
    const list = passing(filter, method).map((i) => String(i.id));
    go({ filter, ...(list.length && !list.includes(image) ? { image: list[0], word: "" } : {}) });
  });
  at("maps").addEventListener("change", (event) => go({ map: event.target.value }));
  at("controls").addEventListener("submit", (event) => event.preventDefault());

  // ---- drawing: only what has changed, so that the focus stays where it is
  function draw() {
    const state = read();
    const same = (...keys) => keys.every((key) => drawn[key] === state[key]);
    at("method").value = state.method;
    for (const button of at("filters").children) {
      if (button.dataset.filter) button.setAttribute("aria-pressed", String(button.dataset.filter === state.filter));
    }
    for (const input of at("maps").querySelectorAll("input")) input.checked = input.value === state.map;
    if (!same("filter", "method")) drawGrid(state);
    markChosen(state);
    if (!same("image", "method")) drawDetail(state);
    drawLegend(state);
    drawMap(state, state.word);
    Object.assign(drawn, state);
  }
  window.addEventListener("hashchange", draw);
  draw();
})();
