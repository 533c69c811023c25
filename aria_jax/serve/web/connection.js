// The WebSocket, with a clock that both sides know; lost and back without losing the session.
export class Connection {
  // hear: {type: function}; state: function of "open" | "lost" | "gone"
  constructor(hear, state) {
    this.hear = hear;
    this.state = state;
    this.session = sessionStorage.getItem("duet");
    this.began = Number(sessionStorage.getItem("began")) || Date.now();
    sessionStorage.setItem("began", this.began);
    // Session time 0 on the page's clock; Date.now() carries it over a reload.
    this.zero = performance.now() - (Date.now() - this.began);
    this.wait = 300;
    this.rtt = null;
    this.waiting = [];
    this.open();
    setInterval(() => this.say("clock"), 250);
  }

  now() { return Math.max(0, Math.round(performance.now() - this.zero)); }

  open() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = this.socket = new WebSocket(`${scheme}://${location.host}/duet`);
    socket.onopen = () => {
      socket.send(JSON.stringify({ type: "hello", session: this.session }));
    };
    socket.onmessage = event => {
      const message = JSON.parse(event.data);
      if (message.type === "welcome") {
        this.session = message.session;
        sessionStorage.setItem("duet", this.session);
        this.wait = 300;
        this.state("open");
      }
      if (message.type === "full" || message.type === "ended") { this.over = true; this.state("gone"); }
      if (message.type === "ended") sessionStorage.removeItem("duet");
      this.hear[message.type]?.(message);
    };
    socket.onclose = () => {
      if (this.over || this.socket !== socket) return;
      this.state("lost");
      setTimeout(() => this.open(), this.wait);
      this.wait = Math.min(this.wait * 1.6, 5000);
    };
  }

  say(type, rest = {}, t = this.now()) {
    if (this.socket.readyState === WebSocket.OPEN && this.session)
      this.socket.send(JSON.stringify({ type, t, ...rest }));
  }
}
