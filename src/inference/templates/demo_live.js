// Live captions: the page hears the microphone, the server answers with events, the page only ever adds final words.
// Given by gr.HTML: `element`, `props` (tab, model) and `server` (hear); by audio_source.js before it: the microphone.
const BLOCK_FRAMES = 512; // 32 ms at 16 kHz
const MESSAGE_SEC = 0.2, TURN_SEC = 0.5; // of audio in a message, at least and at most
const PARAGRAPH_SEC = 2; // a pause that begins a new paragraph
const UNREACHABLE = "The server does not answer. What is on this page stays; press Start to try again.";
const REFUSED = "The browser does not let this page use the microphone; allow it, and press Start.";

const find = selector => element.querySelector(selector);
const [live, toggle, clear, page, files] = [".live", ".toggle", ".clear", ".page", ".files"].map(find);
const hint = find(".hint").cloneNode(true);
const tail = document.createElement("span");
tail.className = "partial";
let recording = null, words = 0, lastEnd = 0;

class Recording {
  // (n,) samples wait in `blocks`; `origin` is the page's clock, in seconds, when the first sample was heard.
  constructor(stream, context) {
    Object.assign(this, {stream, context, rate: context.sampleRate, blocks: [], waiting: 0, heard: 0, stopped: false});
    this.origin = Infinity;
    this.wake = () => {};
  }

  hear(block) {
    this.blocks.push(block);
    this.waiting += block.length;
    this.heard += block.length;
    // the least delayed message tells best when the recording began
    this.origin = Math.min(this.origin, performance.now() / 1000 - this.heard / this.rate);
    live.style.setProperty("--level", Math.min(1, 4 * level(block)));
    this.wake();
  }

  async enough() {
    while (!this.stopped && this.waiting < MESSAGE_SEC * this.rate) await new Promise(wake => { this.wake = wake; });
  }

  take() {
    const taken = [];
    let samples = 0;
    while (this.blocks.length && samples + this.blocks[0].length <= TURN_SEC * this.rate) {
      taken.push(this.blocks.shift());
      samples += taken.at(-1).length;
    }
    this.waiting -= samples;
    return taken;
  }

  stop() {
    this.stopped = true;
    release(this.stream);
    this.context.close();
    this.wake();
  }
}

const level = block => Math.sqrt(block.reduce((sum, sample) => sum + sample * sample, 0) / block.length);

async function run() {
  let first = true, last = false;
  while (!last) {
    await recording.enough();
    const pcm = toBase64(recording.take());
    last = recording.stopped && recording.waiting === 0;
    const reply = await server.hear({tab: props.tab, model: props.model, rate: recording.rate, pcm, first, last});
    first = false;
    if (!reply || reply.error) throw new Error(reply?.error ?? UNREACHABLE);
    reply.events.forEach(show);
    find(".heard").textContent = clock(reply.audio_sec);
    if (reply.language) find(".language").textContent = reply.language;
    if (reply.note) say(reply.note);
    if ("srt" in reply) {
      offer(reply);
      last = true;
    }
  }
}

function show(event) {
  if (event.kind === "final") return;
  const follows = page.scrollHeight - page.scrollTop - page.clientHeight < 40;
  if (event.kind === "partial") {
    place(event.words[0]);
    tail.textContent = event.words.map(word => word.text).join("");
  }
  if (event.kind === "commit") {
    tail.textContent = "";
    event.words.forEach(commit);
    find(".count").textContent = words;
    find(".delay").textContent = `${(performance.now() / 1000 - recording.origin - lastEnd).toFixed(1)} s`;
  }
  if (follows) page.scrollTop = page.scrollHeight;
}

function commit(word) {
  place(word);
  const shown = document.createElement("span");
  shown.className = "word";
  shown.textContent = word.text.trimStart();
  shown.title = `${word.start.toFixed(2)} to ${word.end.toFixed(2)} s`;
  const begins = !page.lastElementChild.querySelector(".word");
  tail.before(word.text.startsWith(" ") && !begins ? " " : "", shown);
  words += 1;
  lastEnd = word.end;
}

function place(word) {
  // move the tail to where the word belongs: after a pause into a new paragraph
  const last = page.lastElementChild, paused = word && word.start - lastEnd > PARAGRAPH_SEC;
  if (!last || (paused && last.querySelector(".word"))) page.append(document.createElement("p"));
  page.lastElementChild.append(tail);
}

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}

function offer(captions) {
  for (const kind of ["srt", "vtt"]) {
    find(`.${kind}`).href = `data:text/plain;charset=utf-8,${encodeURIComponent(captions[kind])}`;
  }
  files.hidden = words === 0;
  if (!words) say("No speech was heard.");
}

function say(text) {
  find(".note").textContent = text;
}

function enter(state) {
  live.dataset.state = state;
  toggle.querySelector("span").textContent = state === "live" ? "Stop" : "Start";
  toggle.disabled = state === "busy";
  clear.disabled = state !== "idle" || !words;
}

function wipe() {
  page.replaceChildren();
  tail.remove();
  tail.textContent = "";
  [words, lastEnd, files.hidden] = [0, 0, true];
  find(".count").textContent = "0";
  find(".heard").textContent = "0:00";
  for (const figure of [".delay", ".language"]) find(figure).textContent = "–";
  say("");
}

toggle.addEventListener("click", async () => {
  if (recording) {
    enter("busy");
    recording.stop();
    return;
  }
  enter("busy");
  wipe();
  try {
    recording = await openMicrophone(16000, BLOCK_FRAMES, (stream, context) => new Recording(stream, context));
    enter("live");
    await run();
  } catch (error) {
    say(error.name === "NotAllowedError" ? REFUSED : error.message);
  } finally {
    tail.textContent = "";
    if (recording && !recording.stopped) recording.stop();
    recording = null;
    if (!page.children.length) page.append(hint.cloneNode(true));
    enter("idle");
  }
});
watch("tab", () => enter("idle"));
clear.addEventListener("click", () => {
  wipe();
  page.append(hint.cloneNode(true));
  enter("idle");
});
