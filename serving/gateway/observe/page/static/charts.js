// What was, since the page was opened, at most ten minutes of it.

import { Forecasts, ofScalers } from "./scaling.js";
import { element } from "./words.js";

const MAX_POINTS = 1200;
const COLOURS = ["#0a7d6c", "#c2571a", "#5b5bd6", "#8a8f98"];
const HEIGHT = 170;

function highest(frame, pick) {
  const found = frame.latencies.map(pick).filter((value) => value !== undefined && value !== null);
  return found.length ? Math.max(...found) : null;
}

function total(frame, pick) {
  return Object.values(frame.state.replicas).reduce((sum, replica) => sum + (replica.snapshot ? pick(replica.snapshot) : 0), 0);
}

const forecasts = new Forecasts();

// Title, lines, and where it is not for every service, for which.
const CHARTS = [
  ["Time to first token, s", [["p50", (f) => highest(f, (each) => each.ttft_s?.p50)], ["p99", (f) => highest(f, (each) => each.ttft_s?.p99)]]],
  ["Time per output token, s", [["p50", (f) => highest(f, (each) => each.tpot_s?.p50)], ["p99", (f) => highest(f, (each) => each.tpot_s?.p99)]]],
  ["First token from sending, p99, s", [["predicted", (f) => highest(f, (each) => each.predicted_ttft_s?.p99)], ["actual", (f) => highest(f, (each) => each.answered_in_s?.p99)]]],
  ["Requests", [["held", (f) => f.state.held.num_requests], ["running", (f) => total(f, (each) => each.num_running_reqs)], ["waiting in engines", (f) => total(f, (each) => each.num_waiting_reqs)]]],
  ["Load, in engines", [["as forecast", (f) => forecasts.dueNow(f)], ["came", (f) => ofScalers(f, (each) => each.wanted.recent_load)], ["engines there", (f) => ofScalers(f, (each) => each.num_running)], ["wanted", (f) => ofScalers(f, (each) => each.wanted.num_wanted)]], (f) => Object.keys(f.state.scalers).length],
];

export class Charts {
  #charts;

  constructor(parent) {
    this.#charts = CHARTS.map(([title, lines, isFor = () => true]) => {
      const box = element("div", { hidden: true }, element("h3", {}, title));
      parent.append(box);
      return { box, lines, isFor, data: [[], ...lines.map(() => [])], plot: null };
    });
    new ResizeObserver(() => this.#resize()).observe(parent);
  }

  add(frame) {
    for (const chart of this.#charts.filter(({ isFor }) => isFor(frame))) {
      chart.box.hidden = false;
      chart.data[0].push(frame.time_s);
      chart.lines.forEach(([, pick], index) => chart.data[index + 1].push(pick(frame)));
      if (chart.data[0].length > MAX_POINTS) chart.data.forEach((values) => values.shift());
      if (chart.plot === null) chart.plot = draw(chart);
      else chart.plot.setData(chart.data);
    }
  }

  #resize() {
    for (const { box, plot } of this.#charts) plot?.setSize({ width: box.clientWidth, height: HEIGHT });
  }
}

function draw({ box, lines, data }) {
  const style = getComputedStyle(document.body);
  const axis = { stroke: style.color, grid: { stroke: "#8886", width: 0.5 }, ticks: { stroke: "#8886", width: 0.5 } };
  return new uPlot({
    width: box.clientWidth,
    height: HEIGHT,
    series: [{}, ...lines.map(([label], index) => ({ label, stroke: COLOURS[index], width: 1.5, points: { show: false } }))],
    scales: { y: { range: (_, low, high) => [0, high || 1] } },
    axes: [axis, { ...axis, size: 52 }],
    legend: { live: false },
    cursor: { drag: { x: false, y: false } },
  }, data, box);
}
