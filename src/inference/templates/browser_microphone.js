// The body of a function of `options`, after audio_source.js: opens the microphone as `window.whisperMicrophone`.
// States: asking (for permission), paused (until a click, where the browser wants one), recording; then stopped (by the
// button), ended, abandoned or failed.
const { rate, blockFrames, queueSec, takeSec, waitMs, abandonedMs } = options;
const WORKLET = `
  registerProcessor("blocks", class extends AudioWorkletProcessor {
    constructor({ processorOptions }) {
      super();
      this.frames = processorOptions.frames;
      this.filled = 0;
      this.block = new Float32Array(this.frames);
    }
    process([[samples]]) {
      if (!samples) return true; // no audio yet
      this.block.set(samples, this.filled);
      this.filled += samples.length;
      if (this.filled === this.frames) {
        this.port.postMessage(this.block); // a copy
        this.filled = 0;
      }
      return true;
    }
  });`;
const queue = [];
const button = document.createElement("button");
const microphone = { state: "asking", error: null, lost: 0 };
let source = null, queued = 0, wake = () => {}, takenAt = performance.now();

const isLive = () => ["asking", "paused", "recording"].includes(microphone.state);

const release = (stream) => stream.getTracks().forEach((track) => track.stop());

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
  if (performance.now() - takenAt > abandonedMs) {
    end("abandoned");
  } else if (queued + samples.length > queueSec * source.context.sampleRate) {
    microphone.lost += 1;
  } else {
    queue.push(samples);
    queued += samples.length;
  }
  wake();
};

const makeListener = async (context) => {
  try {
    const module = URL.createObjectURL(new Blob([WORKLET], { type: "text/javascript" }));
    await context.audioWorklet.addModule(module);
    const node = new AudioWorkletNode(context, "blocks", { ...MONO, processorOptions: { frames: blockFrames } });
    node.port.onmessage = ({ data }) => push(data);
    return node;
  } catch { // an old browser, or a page that forbids modules of its own making
    const node = context.createScriptProcessor(blockFrames, 1, 1);
    node.onaudioprocess = ({ inputBuffer }) => push(inputBuffer.getChannelData(0).slice());
    return node;
  }
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
  const listener = await makeListener(source.context);
  if (!isLive()) return;
  microphone.state = "paused";
  show("Start recording", () => source.context.resume());
  await source.context.resume(); // at once, unless the browser wants a click
  if (!isLive()) return;
  microphone.state = "recording";
  show("Stop recording", () => end("stopped"));
  source.connect(listener).connect(source.context.destination); // silence; what leads nowhere may not run
};

microphone.take = async () => {
  takenAt = performance.now();
  if (!queue.length && isLive()) {
    await new Promise((done) => {
      wake = done;
      setTimeout(done, waitMs);
    });
  }
  const blocks = [];
  let frames = 0;
  while (queue.length && frames < takeSec * source.context.sampleRate) {
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
