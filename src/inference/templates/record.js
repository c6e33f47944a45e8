// The recorder: shows a sentence, records it, sends the take when it has ended, and says what was found in it.
// Given by gr.HTML: `element`, `props` (speaker, max_sec) and `server` (find, hear); by audio_source.js: the microphone.
const RATE = 48000; // what most microphones have; Firefox takes a device at its own rate
const BLOCK_FRAMES = 2048; // 43 ms
const PART_BLOCKS = 40; // of a take in a message: 1.7 s
const FLOOR_DB = -60; // left end of the meter
const NAME = "whisper-recorder-speaker"; // in the browser's storage
const UNREACHABLE = "The server does not answer; the last take is not kept. Try again when it does.";
const REFUSED = "The browser does not let this page use the microphone; allow it, and press Record.";
const NAMELESS = "Write a name for your voice first: recordings are kept by speaker.";

const find = selector => element.querySelector(selector);
const [root, toggle, back, next, speaker, note, player] =
  [".record", ".toggle", ".back", ".next", ".speaker", ".note", ".player"].map(find);
let sentence = null, take = null;

async function ask(call, message) {
  const reply = await call(message).catch(() => null);
  if (!reply || reply.error) throw new Error(reply?.error ?? UNREACHABLE);
  return reply;
}

async function look(at, unread) {
  enter("busy");
  say();
  try {
    if (!speaker.value.trim()) throw new Error(NAMELESS);
    sentence = await ask(server.find, {speaker: speaker.value, at, unread});
    find(".sentence").textContent = sentence.text;
    progress(sentence);
    figures({});
    player.hidden = true;
    if (sentence.recorded) say("good", [unread ? "All sentences are recorded." : "This sentence is recorded."]);
  } catch (error) {
    sentence = null;
    say("bad", [error.message]);
  }
  enter("idle");
  toggle.focus({preventScroll: true}); // one key records, stops and goes on
}

function begin(stream, context) {
  const begun = {stream, context, rate: context.sampleRate, blocks: []};
  return Object.assign(begun, {hear: block => take === begun && hear(block), stop: () => take === begun && stop()});
}

function hear(block) {
  const frames = BLOCK_FRAMES * (take.blocks.length + 1);
  if (frames > props.max_sec * take.rate) return stop();
  take.blocks.push(block);
  const peak = 20 * Math.log10(Math.max(1e-6, ...block.map(Math.abs)));
  root.style.setProperty("--level", Math.max(0, 1 - peak / FLOOR_DB));
  root.classList.toggle("loud", peak > -1);
  find(".time").textContent = `${(frames / take.rate).toFixed(1)} s`;
}

async function stop() {
  const {stream, context, blocks, rate} = take;
  take = null;
  release(stream);
  context.close();
  root.style.setProperty("--level", 0);
  enter("busy");
  try {
    offer(blocks, rate);
    const message = {take: String(Math.random()), speaker: speaker.value, text: sentence.text, rate};
    let reply = null;
    for (let at = 0; at < Math.max(1, blocks.length); at += PART_BLOCKS) {
      const pcm = toBase64(blocks.slice(at, at + PART_BLOCKS)), last = at + PART_BLOCKS >= blocks.length;
      reply = await ask(server.hear, {...message, pcm, first: at === 0, last});
    }
    progress(reply);
    figures(reply);
    if (!reply.kept) say("bad", ["Not kept:", ...reply.remarks]);
    else if (reply.remarks.length) say("odd", ["Kept, but better recorded again:", ...reply.remarks]);
    else say("good", ["Kept: level, clipping and silence are good."]);
  } catch (error) {
    say("bad", ["Not kept:", error.message]);
  }
  enter("idle");
  (note.dataset.kind === "good" ? next : toggle).focus();
}

function offer(blocks, rate) {
  // the take as a WAV file of the page's own, to listen to
  const pcm = toInt16(blocks), head = new DataView(new ArrayBuffer(44));
  const words = [[0, "RIFF"], [8, "WAVE"], [12, "fmt "], [36, "data"]];
  for (const [at, word] of words) [...word].forEach((c, i) => head.setUint8(at + i, c.charCodeAt()));
  for (const [at, value] of [[4, 36 + pcm.byteLength], [16, 16], [24, rate], [28, 2 * rate], [40, pcm.byteLength]]) {
    head.setUint32(at, value, true);
  }
  for (const [at, value] of [[20, 1], [22, 1], [32, 2], [34, 16]]) head.setUint16(at, value, true);
  URL.revokeObjectURL(player.src);
  player.src = URL.createObjectURL(new Blob([head, pcm], {type: "audio/wav"}));
  player.hidden = false;
}

function figures({duration = "0.0 s", level = "–", noise = "–"}) {
  [find(".time").textContent, find(".level").textContent, find(".noise").textContent] = [duration, level, noise];
}

function progress({done, total}) {
  find(".done").textContent = `${done} of ${total}`;
}

function say(kind = "", lines = []) {
  note.dataset.kind = kind;
  note.replaceChildren(...lines.map(line => {
    const shown = document.createElement("p");
    shown.textContent = line;
    return shown;
  }));
}

function enter(state) {
  root.dataset.state = state;
  toggle.querySelector("span").textContent = state === "live" ? "Stop" : "Record";
  toggle.disabled = state === "busy" || !sentence;
  back.disabled = next.disabled = speaker.disabled = state !== "idle";
  if (!sentence) back.disabled = next.disabled = true;
}

toggle.addEventListener("click", async () => {
  if (take) return stop();
  enter("busy");
  say();
  figures({});
  player.pause();
  try {
    take = await openMicrophone(RATE, BLOCK_FRAMES, begin);
    enter("live");
    toggle.focus();
  } catch (error) {
    say("bad", [error.name === "NotAllowedError" ? REFUSED : error.message]);
    enter("idle");
  }
});
back.addEventListener("click", () => look((sentence.at + sentence.total - 1) % sentence.total, false));
next.addEventListener("click", () => look((sentence.at + 1) % sentence.total, true));
speaker.addEventListener("change", () => {
  try {
    localStorage.setItem(NAME, speaker.value);
  } catch { /* a browser without storage */ }
  look(0, true);
});
try {
  speaker.value = props.speaker || localStorage.getItem(NAME) || "";
} catch {
  speaker.value = props.speaker;
}
look(0, true);
