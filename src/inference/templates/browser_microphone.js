// The body of a function of `options`, after audio_source.js: opens the microphone as `window.whisperMicrophone`.
// States: asking (for permission), paused (until a click, where the browser wants one), recording; then stopped (by the
// button), ended, abandoned or failed.
const { rate, queueSec, abandonedSec } = options;
const BLOCK_FRAMES = 2048; // 0.13 s at 16 kHz
const TAKE_SEC = 5; // of audio in one answer at most; more would be a message of megabytes after a pause
const TAKE_WAIT_MS = 1000; // for a first block, before it is answered with none
const queue = [];
const button = document.createElement("button");
const microphone = { state: "asking", error: null, lost: 0 };
let source = null, queued = 0, wake = () => {}, takenAt = performance.now();

const isLive = () => ["asking", "paused", "recording"].includes(microphone.state);

const end = (state, error = null) => {
  if (!isLive()) return;
  Object.assign(microphone, { state, error });
  if (source) {
    release(source.mediaStream);
    source.context.close();
  }
  button.remove();
  wake();
};

const push = (samples) => {
  if (microphone.state !== "recording") return;
  if (performance.now() - takenAt > 1000 * abandonedSec) {
    end("abandoned");
  } else if (queued + samples.length > queueSec * source.context.sampleRate) {
    microphone.lost += 1;
  } else {
    queue.push(samples);
    queued += samples.length;
  }
  wake();
};

const show = (label, onclick) => {
  Object.assign(button, { textContent: label, onclick });
  document.body.append(button);
};

const open = async () => {
  if (!navigator.mediaDevices) throw new DOMException("this page may not use devices", "SecurityError");
  const stream = await navigator.mediaDevices.getUserMedia({ audio: AUDIO });
  if (!isLive()) return release(stream); // allowed too late
  source = openSource(stream, rate);
  stream.getAudioTracks()[0].onended = () => end("ended");
  const listener = await makeListener(source.context, BLOCK_FRAMES, push);
  if (!isLive()) return;
  microphone.state = "paused";
  show("Start recording", () => source.context.resume());
  await source.context.resume(); // at once, unless the browser wants a click
  if (!isLive()) return;
  microphone.state = "recording";
  show("Stop recording", () => end("stopped"));
  source.connect(listener).connect(source.context.destination);
};

microphone.take = async () => {
  takenAt = performance.now();
  if (!queue.length && isLive()) {
    await new Promise((done) => {
      wake = done;
      setTimeout(done, TAKE_WAIT_MS);
    });
  }
  const blocks = [];
  let frames = 0;
  while (queue.length && frames < TAKE_SEC * source.context.sampleRate) {
    blocks.push(queue.shift());
    frames += blocks.at(-1).length;
  }
  queued -= frames;
  const { state, error, lost } = microphone;
  return { state, error, lost, rate: source ? source.context.sampleRate : rate, pcm: toBase64(blocks) };
};
microphone.close = () => end("closed");

window.whisperMicrophone?.close();
window.whisperMicrophone = microphone;
open().catch(({ name, message }) => end("failed", { name, message }));
return true;
