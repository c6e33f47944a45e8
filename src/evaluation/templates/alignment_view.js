(() => {
  "use strict";
  const EDITS = { s: "substitution", d: "deletion", i: "insertion" };
  const TRIES = 50; // a notebook may run this before it has put the view into the page
  const BLANK = "\u00a0";

  const make = (tag, className, ...content) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...content); // strings become text, never markup
    return element;
  };

  const pair = (edit, reference, hypothesis) => {
    const box = make("span", `av-pair${edit ? ` av-${EDITS[edit]}` : ""}`,
      make("span", "av-ref", reference ?? BLANK), make("span", "av-hyp", hypothesis ?? BLANK));
    if (edit) box.title = EDITS[edit];
    return box;
  };

  const words = (said, lang) => {
    const line = make("div", said.metric === "CER" ? "av-words av-characters" : "av-words");
    Object.assign(line, { dir: "auto", lang: lang ?? "" });
    for (const [edit, first, second] of said.steps) {
      if (edit === "=") line.append(...first.split(" ").map((word) => pair("", word, word)));
      else if (edit === "s") line.append(pair("s", first, second));
      else line.append(edit === "d" ? pair("d", first, null) : pair("i", null, first));
    }
    return line;
  };

  const rate = (said) => said.rate === null
    ? `${said.errors} ${said.metric === "CER" ? "character" : "word"}${said.errors === 1 ? "" : "s"}, nothing was said`
    : `${said.metric} ${said.rate.toFixed(2)} (${said.errors} of ${said.units})`;

  const written = (data, row) => {
    const box = make("details", "", make("summary", "", "as written"));
    const lines = [["reference", row.reference], ...row.said.map((said, i) => [data.names[i], said.hypothesis])];
    for (const [name, text] of lines) {
      const written = make("bdi", "", text || "(empty)"); // with a direction of its own
      written.lang = row.lang ?? "";
      box.append(make("p", "", make("span", "av-muted", `${name}: `), written));
    }
    return box;
  };

  const clip = (data, row) => {
    const box = make("article", "av-clip");
    const head = make("div", "av-head", make("strong", "", rate(row.said[0])),
      make("span", "av-muted", `${row.sec.toFixed(1)} s`),
      make("span", "av-muted", row.speaker === null ? "speaker unknown" : `speaker ${row.speaker}`),
      ...(row.language ? [make("span", "av-muted", row.language)] : []),
      make("span", "av-muted av-id", row.id));
    for (const kind of row.kinds) if (data.tags[kind]) head.append(make("span", "av-tag", data.tags[kind]));
    box.append(head);
    row.said.forEach((said, i) => {
      const label = data.names.length > 1 ? `${data.names[i]}${i ? `: ${rate(said)}` : ""}` : "";
      if (label) box.append(make("div", "av-name", label));
      box.append(words(said, row.lang));
    });
    if (row.audio) {
      const player = make("audio");
      Object.assign(player, { controls: true, preload: "metadata", src: row.audio });
      player.setAttribute("aria-label", `recording ${row.id}`);
      box.append(player);
    }
    box.append(written(data, row));
    return box;
  };

  const start = (root) => {
    const data = JSON.parse(root.querySelector(".av-data").textContent);
    const [filter, search, count, list, pager] =
      ["filter", "search", "count", "list", "pager"].map((name) => root.querySelector(`.av-${name}`));
    const [back, onward] = pager.querySelectorAll("button");
    for (const row of data.rows) {
      row.text = [row.id, row.speaker ?? "", row.reference, ...row.said.map((said) => said.hypothesis)].join("\n").toLowerCase();
    }
    for (const [kind, label] of data.filters) {
      const number = kind === "all" ? data.rows.length : data.rows.filter((row) => row.kinds.includes(kind)).length;
      const option = make("option", "", `${label} (${number})`);
      option.value = kind;
      option.disabled = number === 0;
      filter.append(option);
    }
    let first = 0;
    const show = () => {
      const wanted = search.value.trim().toLowerCase();
      const found = data.rows.filter((row) =>
        (filter.value === "all" || row.kinds.includes(filter.value)) && row.text.includes(wanted));
      first = Math.min(first, Math.max(0, found.length - 1));
      first -= first % data.page;
      const last = Math.min(first + data.page, found.length);
      const place = found.length ? `, ${first + 1} to ${last} shown` : "";
      count.textContent = `${found.length} of ${data.rows.length} clip${data.rows.length === 1 ? "" : "s"}${place}`;
      list.replaceChildren(...found.slice(first, last).map((row) => clip(data, row)));
      if (!found.length) list.append(make("p", "av-muted", "no clip matches"));
      back.disabled = first === 0;
      onward.disabled = last >= found.length;
      pager.hidden = found.length <= data.page;
    };
    const again = () => { first = 0; show(); };
    const turn = (step) => { first += step * data.page; show(); root.scrollIntoView({ block: "start" }); };
    filter.addEventListener("change", again);
    search.addEventListener("input", again);
    back.addEventListener("click", () => turn(-1));
    onward.addEventListener("click", () => turn(1));
    show();
  };

  const findViews = (tries) => {
    const views = document.querySelectorAll(".alignment-view:not([data-ready])");
    for (const root of views) {
      root.dataset.ready = "yes";
      start(root);
    }
    if (!views.length && tries) setTimeout(findViews, 100, tries - 1);
  };
  findViews(TRIES);
})();
